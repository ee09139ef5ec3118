"""`python -m tests.interpreted`: the Triton kernels in Triton's interpreter against the reference in float64.

A process of its own, because TRITON_INTERPRET must stand before triton is imported. Outputs are made of NaN, so
that an element nobody wrote is seen. `--mutant NAME` plants a fault first. Prints a JSON line a case: the relative
error of every loss and gradient, and that of plain torch in the same dtype. Numbers are judged in the tests.

The interpreter keeps bfloat16 as bits, multiplies the bits and cuts casts off; `true_bfloat16` mends both. What it
cannot show is the order in which a GPU adds.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import json
import os
import textwrap
from collections.abc import Callable
from functools import partial

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline.distill.kernels import (
    dropout,
    eager,
    flash,
    gram,
    group_linear,
    reference,
    small,
    swap_mix,
    tiles,
)
from pipeline.distill.kernels.configs import MAX_TOKENS
from pipeline.distill.kernels.philox import Key
from pipeline.distill.projectors import token_groups
from tests.mutants import MUTANTS

SHAPES = (
    (2, 20, 2, 16),
    (1, 49, 2, 64),
    (1, 64, 2, 32),
    (2, 65, 1, 32),
    (1, 196, 1, 64),
)  # B N H d
DRAWS = (
    ("element", 0.5),
    ("element", 0.3),
    ("token", 0.5),
    ("matrix", 0.5),
    ("element", 0.0),
    ("element", 1.0),
)
GROUPED = (  # B, grid, c, D: groups of 16 and 4; 16, 12, 12 and 9; 16; 16 and 4 and 1; 16, 8 and 4
    (2, (5, 4), 24, 40),
    (2, (7, 7), 136, 48),
    (3, (8, 8), 64, 64),
    (2, (13, 5), 16, 32),
    (2, (14, 14), 160, 144),
)
NEAR = (1.0, 0.1, 0.01)  # ||student - teacher|| / ||teacher||


def plant(name: str) -> None:
    """Rebuild one jitted function from its source with the fault in it."""
    function, before, after = MUTANTS[name]
    for module in (tiles, swap_mix, dropout, gram, small, flash, group_linear):
        if not hasattr(module, function):
            continue
        jitted = getattr(module, function)
        source = textwrap.dedent(inspect.getsource(jitted.fn))
        assert source.count(before) >= 1, f"{name}: {before!r} is not in {function}"
        _rebuild(module, function, source.replace(before, after))
    if function == "swap_mask":  # imported by name elsewhere
        tiles.mixed_tile.fn.__globals__[function] = tiles.swap_mask
        swap_mix.swap_mask = dropout.swap_mask = tiles.swap_mask


def _rebuild(module: object, function: str, source: str) -> None:
    import linecache

    assert ast.parse(source)
    path = f"<mutant {function}>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    exec(compile(source, path, "exec"), vars(module))


def relative(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; where the exact one is 0, the norm of what was got."""
    size = exact.norm().item()
    return ((got.double() - exact).norm() / (size or 1.0)).item()


def true_bfloat16() -> None:
    """Let the interpreter multiply bfloat16 values instead of their bits, and round casts to the nearest."""
    dot, cast = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def wide(handle: TensorHandle) -> TensorHandle:
        if handle.dtype.scalar != tl.bfloat16:
            return handle
        bits = handle.data.astype(np.uint32) << 16
        return TensorHandle(bits.view(np.float32), tl.float32)

    def product(self, a, b, d, *how):
        return dot(self, wide(a), wide(b), d, *how)

    def to(self, src, dst_type):
        if tl.bfloat16 not in (src.dtype.scalar, dst_type.scalar):
            return cast(self, src, dst_type)
        values = wide(src)
        if dst_type.scalar != tl.bfloat16:
            return cast(self, values, dst_type)
        bits = np.ascontiguousarray(values.data.astype(np.float32)).view(np.uint32)
        return TensorHandle(
            ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).astype(np.uint16), tl.bfloat16
        )

    InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl = product, to


def packed(shape: tuple[int, ...], draw: torch.Generator, layout: str) -> Tensor:
    """qkv (B, N, 3, H, d), contiguous or as the projector's convolutions leave it: only d has unit stride."""
    batch, n, n_heads, width = shape
    if layout == "dense":
        return torch.randn(batch, n, 3, n_heads, width, generator=draw)
    return torch.randn(3, batch, n, n_heads, width + 16, generator=draw)[..., :width].permute(
        1, 2, 0, 3, 4
    )


Errors = dict[str, float]


def attention_case(
    shape: tuple[int, int, int, int], granularity: str, p: float, layout: str, kind: torch.dtype
) -> tuple[Errors, Errors]:
    """The kernels of L_proj1 on one input, and plain torch in the same dtype."""
    draw = torch.Generator().manual_seed(sum(shape) + round(100 * p))
    s, t = (packed(shape, draw, layout).to(kind) for _ in range(2))
    batch, n, n_heads, width = shape
    key = Key(2**62 + 12345, torch.tensor([900, 7][:batch]), 41)
    told = (key.ids, key.stream(), p, granularity)
    exact_s = s.double().requires_grad_()
    attention, vv = reference.pca_loss(exact_s, t.double(), key, p, granularity)
    (d_attention,) = torch.autograd.grad(attention, exact_s, retain_graph=True)
    (d_gram,) = torch.autograd.grad(vv, exact_s)
    count, errors, plain = batch * n * n_heads * width, {}, {}
    mixed = swap_mix.swap_mix(s, t, *told)
    errors["mix"] = float(not torch.equal(mixed, reference.swap_mix(s, t, key, p, granularity)))
    zeros = swap_mix.swap_mix(s, None, *told)
    mask = reference.swap_masks(key, s.shape, p, granularity)
    errors["mix backward"] = float(not torch.equal(zeros, s.masked_fill(mask, 0)))
    for found, loss_and_gradient in (
        (errors, gram.gram(s[:, :, 2], t[:, :, 2])),
        (plain, eager.gram_loss(s[:, :, 2], t[:, :, 2])),
    ):
        found["gram"] = relative(loss_and_gradient[0], vv)
        found["gram gradient"] = relative(loss_and_gradient[1].double() / count, d_gram[:, :, 2])
    kernels: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"flash": flash.flash}
    if n <= MAX_TOKENS:
        kernels["small"] = small.small
    for name, kernel in kernels.items():
        loss, gradient = kernel(s, t, *told)
        again, same = kernel(s, t, *told)
        errors[name] = relative(loss, attention)
        errors[f"{name} gradient"] = relative(gradient.double() / count, d_attention)
        errors[f"{name} again"] = float(
            not (torch.equal(loss, again) and torch.equal(gradient, same))
        )
        loss, gradient = eager.attention_loss(s, t, key, p, granularity)
        plain[name] = relative(loss, attention)
        plain[f"{name} gradient"] = relative(gradient.double() / count, d_attention)
    return errors, plain


def gram_case(near: float, kind: torch.dtype) -> tuple[Errors, Errors]:
    """The Gram kernel with the student `near` the teacher, and plain torch in the same dtype."""
    draw = torch.Generator().manual_seed(0)
    t = torch.randn(2, 49, 2, 64, generator=draw)
    s = (t + near * torch.randn(t.shape, generator=draw)).to(kind)
    t = t.to(kind)
    exact = s.double().requires_grad_()
    vv = reference.gram_loss(exact.transpose(1, 2), t.double().transpose(1, 2))
    (d_gram,) = torch.autograd.grad(vv, exact)
    found = []
    for by in (gram.gram, eager.gram_loss):
        loss, gradient = by(s, t)
        found.append(
            {
                "gram": relative(loss, vv),
                "gram gradient": relative(gradient.double() / s.numel(), d_gram),
            }
        )
    return found[0], found[1]


def group_case(
    shape: tuple[int, tuple[int, int], int, int], near: float, layout: str, kind: torch.dtype
) -> tuple[Errors, Errors]:
    """The kernels of L_proj2 on one input, the target `near` the projection, and plain torch in the same dtype."""
    batch, grid, channels, width = shape
    draw = torch.Generator().manual_seed(sum(grid))
    n, groups = grid[0] * grid[1], token_groups(*grid)
    order, sizes = [t for g in groups for t in g], [len(g) for g in groups]
    x = torch.randn(batch, n, channels + 16 * (layout == "strided"), generator=draw).to(kind)
    x = x[..., :channels]
    weight = (torch.randn(len(groups), width, channels, generator=draw) / channels**0.5).to(kind)
    bias = torch.randn(len(groups), width, generator=draw).to(kind)
    noise = torch.randn(batch, n, width, generator=draw)
    close = reference.gl_project(x.float(), weight.float(), bias.float(), groups) + near * noise
    target, upstream = close.to(kind), noise.to(kind)
    key = Key(2**62 + 12345, torch.tensor([900, 7, 3][:batch]), 41)
    dropped = dropout.dropout(x, key.ids, key.stream(), 0.3)
    kept = reference.dropout(x, key, 0.3)
    errors: Errors = {
        "dropout": relative(dropped, kept.double()),
        "dropout mask": float(not torch.equal(dropped == 0, kept == 0)),
    }
    plain: Errors = {"dropout": relative(kept, reference.dropout(x.double(), key, 0.3))}
    exact = [v.double().requires_grad_() for v in (x, weight, bias)]
    out = reference.gl_project(*exact, groups)
    wanted = torch.autograd.grad(out, exact, upstream.double(), retain_graph=True)
    for found, forward, backward in (
        (errors, group_linear.project, group_linear.gradients),
        (
            plain,
            partial(eager.group_linear, grouped=False),
            partial(eager.group_linear_backward, grouped=False),
        ),
    ):
        loss, projected, residual = forward(x, weight, bias, target, order, sizes)
        found["gl"] = relative(loss, (out - target.double()).square().mean())
        found["gl out"] = relative(projected, out.detach())
        found["gl residual"] = relative(residual, (out - target.double()).detach())
        for name, got, right in zip(
            ("tokens", "weight", "bias"),
            backward(x, weight, upstream, order, sizes),
            wanted,
            strict=True,
        ):
            found[f"gl gradient of {name}"] = relative(got, right)
    alone = group_linear.project(x, weight, bias, None, order, sizes)[1]
    errors["gl alone"] = float(
        not torch.equal(alone, group_linear.project(x, weight, bias, target, order, sizes)[1])
    )
    return errors, plain


def main(args: argparse.Namespace) -> None:
    """All shapes with an even draw, and every draw on the smallest; quick, or with a mutant, three of them."""
    empty = torch.empty
    torch.empty = lambda *shape, **kind: empty(*shape, **kind).fill_(float("nan"))
    kind = getattr(torch, args.dtype)
    if kind == torch.bfloat16:
        true_bfloat16()
    first, ragged = SHAPES[0], SHAPES[3]
    whole = args.scope == "all" and not args.mutant
    attention = [(first, "element", 0.5, "dense"), (ragged, "element", 0.5, "strided")]
    grouped = [(GROUPED[1], 1.0, "strided")]
    if args.mutant:
        plant(args.mutant)
    if whole:
        attention = [(s, "element", 0.5, "strided") for s in SHAPES]
        attention += [(first, g, p, "dense") for g, p in DRAWS]
        grouped = [(s, 1.0, "strided") for s in GROUPED]
        if kind != torch.float32:  # there the product's own rounding is what a near target shows
            grouped += [(GROUPED[1], near, "dense") for near in NEAR]
    cases = [("attention", attention_case, one) for one in attention]
    cases += [("groups", group_case, one) for one in grouped]
    cases += [("gram", gram_case, (near,)) for near in (NEAR if whole else ())]
    for name, run, arguments in cases:
        errors, plain = run(*arguments, kind)
        print(
            json.dumps({"case": [name, *arguments], "errors": errors, "plain": plain}), flush=True
        )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.interpreted", description=__doc__)
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--scope", choices=("quick", "all"), default="quick")
    main(parser.parse_args())
