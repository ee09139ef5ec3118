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

os.environ["TRITON_INTERPRET"] = "1"

import numpy as np
import torch
import triton.language as tl
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

from pipeline.distill import projectors
from pipeline.distill.kernels import (
    dropout,
    eager,
    flash,
    flash_gradient,
    fused_gl,
    fused_pca,
    gl,
    gram,
    group_linear,
    reference,
    small,
    swap_mix,
    tiles,
)
from pipeline.distill.kernels.configs import MAX_TOKENS
from pipeline.distill.kernels.philox import Key
from tests.mutants import MUTANTS

SHAPES = (
    (2, 20, 2, 16),
    (1, 49, 2, 64),
    (1, 64, 2, 32),
    (2, 65, 1, 32),
    (1, 196, 1, 64),
    (1, 33, 2, 80),
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


MODULES = (tiles, swap_mix, dropout, gram, small, flash, flash_gradient, group_linear)


def plant(name: str) -> None:
    """Rebuild one jitted function from its source with the fault in it."""
    function, before, after = MUTANTS[name]
    for module in MODULES:
        if not hasattr(module, function):
            continue
        jitted = getattr(module, function)
        source = textwrap.dedent(inspect.getsource(jitted.fn))
        assert source.count(before) >= 1, f"{name}: {before!r} is not in {function}"
        _rebuild(module, function, source.replace(before, after))
        for other in MODULES:  # that import it by name
            if getattr(other, function, None) is jitted:
                setattr(other, function, getattr(module, function))
        return


def _rebuild(module: object, function: str, source: str) -> None:
    import linecache

    assert ast.parse(source)
    path = f"<mutant {function}>"
    linecache.cache[path] = (len(source), None, source.splitlines(True), path)
    exec(compile(source, path, "exec"), vars(module))


def relative(got: Tensor, exact: Tensor) -> float:
    """||got - exact|| / ||exact||; where the exact one is 0, the norm of what was got.

    Below 1e-20 it is 0: the rounding of two equal float64 values on some CPUs.
    """
    size = exact.norm().item()
    return ((got.double() - exact).norm() / (size if size > 1e-20 else 1.0)).item()


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
    loss, gradient = eager.attention_loss(s, t, key, p, granularity)
    plain_attention = relative(loss, attention), relative(gradient.double() / count, d_attention)
    plain_gram = plain["gram"], plain["gram gradient"]
    impls = [impl for impl, fits in (("small", n <= MAX_TOKENS), ("flash", width <= 64)) if fits]
    for impl in impls:
        runs = [fused(s, t, told, impl, count) for _ in range(1 + (shape == SHAPES[0]))]
        same = (torch.equal(a, b) for a, b in zip(runs[0], runs[-1], strict=True))
        errors[f"{impl} again"] = float(not all(same))
        loss, vv_loss, of_attention, of_gram, of_both = runs[0]
        exact = d_attention, d_gram, 2 * d_attention + 3 * d_gram
        names = (
            impl,
            f"{impl} gram",
            f"{impl} gradient",
            f"{impl} gram gradient",
            f"{impl} gradient of both",
        )
        found = (loss, vv_loss, of_attention, of_gram, of_both)
        for name, got, right in zip(names, found, (attention, vv, *exact), strict=True):
            errors[name] = relative(got.double(), right)
        plain |= dict(zip(names[0:3:2], plain_attention, strict=True))
        plain |= dict(zip(names[1:4:2], plain_gram, strict=True))
    return errors, plain


def fused(
    s: Tensor, t: Tensor, told: tuple[Tensor, Tensor, float, str], impl: str, count: int
) -> list[Tensor]:
    """By the operator and its autograd: both losses; the gradient of each alone, and of 2 and 3 times them.

    Backwards in units of 1 / count, which float16 would lose.
    """
    leaf = s.clone().requires_grad_()
    attention, gram_loss, *_ = fused_pca.fused_pca_op(leaf, t, *told, impl)
    found = [attention.detach(), gram_loss.detach()]
    for total in (attention, gram_loss, 2 * attention + 3 * gram_loss):
        (gradient,) = torch.autograd.grad(total, leaf, torch.tensor(1.0 * count), retain_graph=True)
        found.append(gradient.double() / count)
    return found


def gram_case(near: float, kind: torch.dtype) -> tuple[Errors, Errors]:
    """Every Gram kernel with the student `near` the teacher, and plain torch in the same dtype."""
    draw = torch.Generator().manual_seed(0)
    t = torch.randn(2, 49, 3, 2, 64, generator=draw)
    s = (t + near * torch.randn(t.shape, generator=draw)).to(kind)
    t = t.to(kind)
    v_s, v_t = s[:, :, 2], t[:, :, 2]
    exact = v_s.double().requires_grad_()
    vv = reference.gram_loss(exact.transpose(1, 2), v_t.double().transpose(1, 2))
    (d_gram,) = torch.autograd.grad(vv, exact)

    def found(loss: Tensor, gradient: Tensor) -> tuple[float, float]:
        return relative(loss, vv), relative(gradient.double(), d_gram)

    names = ("gram", "gram gradient")
    loss, gradient = gram.gram(v_s, v_t)
    errors = dict(zip(names, found(loss, gradient.double() / v_s.numel()), strict=True))
    loss, gradient = eager.gram_loss(v_s, v_t)
    of_plain = found(loss, gradient.double() / v_s.numel())
    plain = dict(zip(names, of_plain, strict=True))
    told = torch.tensor([900, 7]), torch.tensor([5, 41]), 0.5, "element"
    for impl in ("small", "flash"):
        _, loss, _, gradient, _ = fused(s, t, told, impl, v_s.numel())
        named = [f"{impl} {name}" for name in names]
        errors |= dict(zip(named, found(loss, gradient[:, :, 2]), strict=True))
        plain |= dict(zip(named, of_plain, strict=True))
    return errors, plain


def group_case(
    shape: tuple[int, tuple[int, int], int, int], near: float, layout: str, kind: torch.dtype
) -> tuple[Errors, Errors]:
    """The kernels of L_proj2 on one input, the target `near` the projection, and plain torch in the same dtype."""
    batch, grid, channels, width = shape
    draw = torch.Generator().manual_seed(sum(grid))
    n, groups = grid[0] * grid[1], projectors.token_groups(*grid)
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
    layout = order, sizes
    for name, dropped_by in (("gl", 0.0), ("gl dropped", 0.3)):
        exact = by_reference(x, weight, bias, target, upstream, key, dropped_by, groups)
        ours = by_operator(
            lambda *leaves, p=dropped_by: fused_gl.fused_gl_op(
                *leaves, target, key.ids, key.stream(), *layout, p
            ),
            *(x, weight, bias, upstream),
        )
        theirs = by_operator(
            lambda *leaves, p=dropped_by: gl.group_linear_op(
                reference.dropout(leaves[0], key, p), *leaves[1:], target, *layout, False
            ),
            *(x, weight, bias, upstream),
        )
        for part, right in exact.items():
            errors[f"{name} {part}".strip()] = relative(ours[part], right)
            plain[f"{name} {part}".strip()] = relative(theirs[part], right)
    nothing = torch.zeros(2, dtype=torch.int64)
    alone = fused_gl.fused_gl_op(x, weight, bias, None, nothing, nothing, *layout, 0.0)[1]
    errors["gl alone"] = float(
        not torch.equal(alone, group_linear.project(x, weight, bias, target, *layout)[1])
    )
    return errors, plain


Parts = dict[str, Tensor]


def by_operator(
    operator: Callable[..., tuple[Tensor, ...]],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    upstream: Tensor,
) -> Parts:
    """Loss, projection, residual; and the gradients of each of the first two alone and of both."""
    leaves = [v.clone().requires_grad_() for v in (x, weight, bias)]
    loss, out, residual, *_ = operator(*leaves)
    return parts_of(loss, out, residual, leaves, upstream)


def by_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    upstream: Tensor,
    key: Key,
    p: float,
    groups: projectors.Groups,
) -> Parts:
    """The same in float64 by `reference.gl_mse`."""
    leaves = [v.double().requires_grad_() for v in (x, weight, bias)]
    loss, out = reference.gl_mse(*leaves, target.double(), groups, p, key)
    return parts_of(loss, out, out - target.double(), leaves, upstream.double())


def parts_of(
    loss: Tensor, out: Tensor, residual: Tensor, leaves: list[Tensor], upstream: Tensor
) -> Parts:
    """Loss, projection, residual, gradients by name; the loss times its count, which float16 would lose."""
    count = torch.tensor(1.0 * out.numel(), dtype=loss.dtype)
    parts = {"": loss.detach(), "out": out.detach(), "residual": residual.detach()}
    sent = {"loss": ((loss,), (count,)), "out": ((out,), (upstream,))}
    sent["both"] = (loss, out), (count, upstream)
    for source, (outputs, gradients) in sent.items():
        found = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
        for leaf, gradient in zip(("tokens", "weight", "bias"), found, strict=True):
            parts[f"gradient of {leaf} by {source}"] = gradient
    return parts


def check_operators() -> None:
    """Schema, fake, autograd and compilation of the two operators, as torch checks its own."""
    draw = torch.Generator().manual_seed(0)
    s, t = (packed((2, 20, 2, 16), draw, "dense") for _ in range(2))
    ids, stream = torch.tensor([900, 7]), torch.tensor([5, 41])
    for impl in ("small", "flash"):
        leaf = s.clone().requires_grad_()
        torch.library.opcheck(fused_pca.fused_pca_op, (leaf, t, ids, stream, 0.5, "token", impl))
    groups = projectors.token_groups(5, 4)
    layout = [t for g in groups for t in g], [len(g) for g in groups]
    x, weight, bias = (
        torch.randn(size, generator=draw).requires_grad_()
        for size in ((2, 20, 24), (2, 40, 24), (2, 40))
    )
    for target, p in ((torch.randn(2, 20, 40, generator=draw), 0.3), (None, 0.0)):
        torch.library.opcheck(
            fused_gl.fused_gl_op, (x, weight, bias, target, ids, stream, *layout, p)
        )


def main(args: argparse.Namespace) -> None:
    """All shapes with an even draw, and every draw on the smallest; quick, or with a mutant, three of them."""
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made

    torch.empty = poisoned
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
        if kind == torch.float32:
            check_operators()
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
