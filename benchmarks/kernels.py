"""The projector losses, measured: `python -m benchmarks.kernels`. A table and its JSON; on a GPU the ceilings too.

Every provider computes the attention and the Gram term of eq. 4 with the gradient. Times are medians of a call
with its backward; on a GPU with the L2 cache flushed and as absolute times, on a CPU as ratios, taken in turns.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import record
from pipeline import cli, files
from pipeline.errors import UserError
from pipeline.kernels import ops, reference
from pipeline.kernels.philox import Key

SCHEMA = "cakd.benchmark.kernels/1"
TURNS = 7
Loss = Callable[[Tensor, Tensor, Key], tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class Shape:
    """B samples, N tokens, H heads, d wide."""

    batch: int
    n: int
    n_heads: int
    width: int

    def __str__(self) -> str:
        return f"B {self.batch} N {self.n} H {self.n_heads} d {self.width}"


ON_GPU = (
    Shape(256, 196, 12, 64),
    Shape(512, 49, 12, 64),
    Shape(512, 64, 6, 64),
    Shape(1024, 64, 3, 64),
)
ON_CPU = (Shape(16, 196, 12, 64), Shape(32, 49, 12, 64), Shape(64, 64, 4, 16))


def providers(compiled: bool) -> dict[str, Loss]:
    """Name -> the two losses; the textbook first, what the others are held against."""
    found: dict[str, Loss] = {"reference (autograd)": reference.pca_loss}
    if compiled:
        found["reference, torch.compile"] = torch.compile(reference.pca_loss, dynamic=False)
    for impl in ops.IMPLS[1:]:
        found[impl] = partial(ops.pca_loss, impl=impl)
    return found


def call(loss: Loss, s: Tensor, t: Tensor, key: Key) -> None:
    """Forward and backward of both terms."""
    s.grad = None
    attention, gram = loss(s, t, key)
    (attention + 0.05 * gram).backward()


def measure(shape: Shape, kind: torch.dtype, where: torch.device, compiled: bool) -> dict[str, Any]:
    """Milliseconds (median and quartiles), and on a GPU peak memory above the inputs, of every provider."""
    draw = torch.Generator().manual_seed(0)
    size = (shape.batch, shape.n, 3, shape.n_heads, shape.width)
    s, t = (torch.randn(size, generator=draw).to(where, kind) for _ in range(2))
    s.requires_grad_()
    key = Key(1, torch.arange(shape.batch, device=where), 3)
    rows: dict[str, Any] = {}
    running: dict[str, Loss] = {}
    for name, loss in providers(compiled).items():
        try:
            call(loss, s, t, key)
        except UserError as error:
            rows[name] = {"reason": str(error)}
            continue
        running[name] = loss
    times = _on_gpu(running, s, t, key) if where.type == "cuda" else _in_turns(running, s, t, key)
    for name, values in times.items():
        low, middle, high = statistics.quantiles(values, n=4)
        rows[name] = {"ms": {"median": middle, "p25": low, "p75": high}}
        if where.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            call(running[name], s, t, key)
            rows[name]["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return {name: rows[name] for name in providers(compiled)}


def _in_turns(running: dict[str, Loss], s: Tensor, t: Tensor, key: Key) -> dict[str, list[float]]:
    times: dict[str, list[float]] = {name: [] for name in running}
    for _ in range(TURNS):
        for name, loss in running.items():
            start = time.perf_counter()
            call(loss, s, t, key)
            times[name].append(1e3 * (time.perf_counter() - start))
    return times


def _on_gpu(running: dict[str, Loss], s: Tensor, t: Tensor, key: Key) -> dict[str, list[float]]:
    from triton.testing import do_bench

    return {
        name: do_bench(lambda loss=loss: call(loss, s, t, key), return_mode="all")
        for name, loss in running.items()
    }


def ceilings() -> dict[str, float]:
    """GB/s of a large copy and TFLOP/s of a large bf16 product on this GPU."""
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda")
    target = torch.empty_like(source)
    copied = 2 * source.numel() * 4 / do_bench(lambda: target.copy_(source)) / 1e6
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    return {
        "copy_gb_per_s": copied,
        "bf16_tflop_per_s": 2 * 8192**3 / do_bench(lambda: a @ b) / 1e9,
    }


def table(found: dict[str, Any]) -> str:
    """The Markdown table: ratios to the reference; on a GPU milliseconds and memory too."""
    gpu = found["ceilings"] is not None
    lines = ["| shape | provider | time / reference |" + (" ms | peak MB |" if gpu else "")]
    lines.append("|---|---|--:|" + ("--:|--:|" if gpu else ""))
    for shape, rows in found["shapes"].items():
        base = next(iter(rows.values()))["ms"]["median"]
        for name, row in rows.items():
            if "reason" in row:
                lines.append(f"| {shape} | {name} | not measured |" + (" | |" if gpu else ""))
                continue
            ms = row["ms"]["median"]
            more = f" {ms:.3f} | {row['peak_mb']:.0f} |" if gpu else ""
            lines.append(f"| {shape} | {name} | {ms / base:.2f} |{more}")
    if not gpu:
        lines += ["", "GPU: not measured."]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    where = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    gpu = where.type == "cuda"
    kind = torch.bfloat16 if gpu else torch.float32
    shapes = (ON_GPU if gpu else ON_CPU)[: args.shapes]
    found: dict[str, Any] = {
        "dtype": str(kind).removeprefix("torch."),
        "shapes": {str(shape): measure(shape, kind, where, gpu) for shape in shapes},
        "ceilings": ceilings() if gpu else None,
    }
    shown = table(found)
    print(shown)
    if args.out is None:
        return
    made_by = files.provenance({"shapes": args.shapes})
    shown = f"{found['dtype']}\n\n{shown}"
    record.write(args.out, SCHEMA, found, made_by, "python -m benchmarks.kernels", shown)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.kernels", description=__doc__)
    parser.add_argument("--shapes", type=int, help="only the first so many")
    parser.add_argument("--out", type=Path, help="where to write, without suffix")
    cli.run(main, parser)
