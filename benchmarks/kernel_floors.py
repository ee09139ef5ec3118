"""Bytes, products and least times of the projector losses with their gradients, by arithmetic, without a GPU.

`python -m benchmarks.kernel_floors` prints the table of docs/kernels.md. `floor`: what any implementation reads,
writes and multiplies; `ours`: what the Triton kernels do, each tensor once a launch, as a head's keys, which every
block of its queries reads, stay in the L2 cache.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass

from benchmarks.shapes import ON_GPU, Shape
from pipeline.core import cli
from pipeline.distill import projectors
from pipeline.distill.kernels.configs import MAX_TOKENS, WIDEST_GRAM


@dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes to and from memory."""

    flops: float
    bytes: float

    def ms(self, copy_tb_per_s: float, tflop_per_s: float) -> float:
        """The least time: the slower of bytes and products."""
        return max(self.bytes / copy_tb_per_s, self.flops / tflop_per_s) / 1e9


def attention_floor(shape: Shape, element_size: int = 2) -> Cost:
    """Both qkv read and one gradient written; four products N x N x d for each side's attention and gradient."""
    per_head = 8 * shape.n * shape.n * shape.width + 5 * shape.n * shape.width**2
    return Cost(2.0 * _heads(shape) * per_head, 9.0 * _tokens(shape) * element_size)


def attention_ours(shape: Shape, element_size: int = 2) -> Cost | None:
    """`small`: two passes over both qkv. `flash`: three, 2 E written and read twice, the Gram gradient once more.

    None where neither takes the shape.
    """
    n, width, unit = shape.n, shape.width, _tokens(shape) * element_size
    if n <= MAX_TOKENS:
        forward = 5 * n * n * width
        return Cost(2.0 * _heads(shape) * (forward + 10 * n * n * width), 15.0 * unit)
    if width > WIDEST_GRAM:
        return None
    rows = 6 * 4 * _heads(shape) * n  # log-sum-exp and delta: written once, read twice
    # Forward 6 in, 1 out; queries 6 + 1 in, 2 out (dQ and Gram's dV); keys 6 + 1 + 1 in, 2 out.
    moved = (7 + 9 + 10) * unit + 2 * 2 * unit  # and V of both once more for each Gram program
    per_head = 11 * n * n * width + (3 + 5) * n * width**2
    return Cost(2.0 * _heads(shape) * per_head, float(moved + rows))


def tokens_floor(shape: Shape, element_size: int = 2) -> Cost:
    """x and target read, projection and gradient of x written, weights read and their gradient written."""
    return Cost(
        _products(shape),
        element_size * (2.0 * _x(shape) + 2 * _tokens(shape) + 2 * _weights(shape)),
    )


def tokens_ours(shape: Shape, element_size: int = 2) -> Cost:
    """Dropout one pass over x; product: x, weights and target in, projection and residual out; gradients."""
    dropout = 2 * _x(shape)
    forward = _x(shape) + _weights(shape) + 3 * _tokens(shape)
    gradients = 2 * _x(shape) + 2 * _weights(shape) + _tokens(shape)
    return Cost(_products(shape), float(element_size * (dropout + forward + gradients)))


def _heads(shape: Shape) -> int:
    return shape.batch * shape.n_heads


def _tokens(shape: Shape) -> int:
    """Elements of Q, of K, of V, or of h_T."""
    return shape.batch * shape.n * shape.n_heads * shape.width


def _x(shape: Shape) -> int:
    return shape.batch * shape.n * shape.channels


def _weights(shape: Shape) -> int:
    groups = len(projectors.token_groups(*shape.grid))
    return groups * shape.n_heads * shape.width * shape.channels


def _products(shape: Shape) -> float:
    """One product for the projection, one for the tokens, one for the weights."""
    return 6.0 * _x(shape) * shape.n_heads * shape.width


def table(copy_tb_per_s: float, tflop_per_s: float) -> str:
    """The Markdown table, bfloat16."""
    lines = [
        "| work | floor: GFLOP | MB | ms | ours: GFLOP | MB | ms |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for name, floor, ours in (
        ("attention", attention_floor, attention_ours),
        ("tokens", tokens_floor, tokens_ours),
    ):
        for shape in ON_GPU:
            cells = (
                " | ".join(_figures(cost, copy_tb_per_s, tflop_per_s))
                for cost in (floor(shape), ours(shape))
            )
            lines.append(f"| {name}, {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _figures(cost: Cost | None, copy_tb_per_s: float, tflop_per_s: float) -> tuple[str, str, str]:
    if cost is None:
        return "PyTorch's", "", ""
    ms = cost.ms(copy_tb_per_s, tflop_per_s)
    return f"{cost.flops / 1e9:.0f}", f"{cost.bytes / 1e6:.0f}", f"{ms:.3f}"


def main(args: argparse.Namespace) -> None:
    """Print the table."""
    print(table(args.copy, args.products))


if __name__ == "__main__":
    made = argparse.ArgumentParser(prog="benchmarks.kernel_floors", description=__doc__)
    made.add_argument(
        "--copy", type=float, default=3.0, help="TB/s of memory; default 3.0, an H100"
    )
    made.add_argument("--products", type=float, default=720.0, help="TFLOP/s; default 720, an H100")
    cli.run(main, made)
