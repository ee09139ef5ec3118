"""`python -m tests.interpreted`: the Triton kernels in Triton's interpreter against the reference in float64.

A process of its own, because TRITON_INTERPRET must stand before triton is imported. Outputs are made of NaN, so
that an element nobody wrote is seen. `--mutant NAME` plants a fault first. Prints a JSON line a case: the relative
error of every loss and gradient. Numbers are judged in the tests, not here.
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

import torch
from torch import Tensor

from pipeline.kernels import flash, gram, reference, small, swap_mix, tiles
from pipeline.kernels.philox import Key

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
# name -> the function it spoils, what is replaced, by what
MUTANTS: dict[str, tuple[str, str, str]] = {
    "scale one percent off": ("small_kernel", "* SCALE\n    d_k", "* SCALE * 1.01\n    d_k"),
    "the mask stream of another matrix": ("small_kernel", "*(head, n, 1,", "*(head, n, 2,"),
    "keys beyond the end": ("_add_keys", 'tl.where(real, scores, float("-inf"))', "scores"),
    "delta dropped": ("_weights", "(d_p - delta[:, None])", "d_p"),
    "gradient through what was swapped": (
        "flash_queries_kernel",
        "tl.where(took_q, 0.0, d_q * SCALE)",
        "(d_q * SCALE)",
    ),
    "no rescaling of earlier keys": ("_add_keys", "out * shrink[:, None]", "out"),
    "the step ignored": ("swap_mask", "step.to(tl.uint32)", "(step * 0).to(tl.uint32)"),
    "half of the mean missing in the Gram gradient": ("gram_kernel", "mm - mr / 2", "mm"),
}


def plant(name: str) -> None:
    """Rebuild one jitted function from its source with the fault in it."""
    function, before, after = MUTANTS[name]
    for module in (tiles, swap_mix, gram, small, flash):
        if not hasattr(module, function):
            continue
        jitted = getattr(module, function)
        source = textwrap.dedent(inspect.getsource(jitted.fn))
        assert source.count(before) >= 1, f"{name}: {before!r} is not in {function}"
        _rebuild(module, function, source.replace(before, after))
    if function == "swap_mask":  # imported by name elsewhere
        tiles.mixed_tile.fn.__globals__[function] = tiles.swap_mask
        swap_mix.swap_mask = tiles.swap_mask


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


def packed(shape: tuple[int, ...], draw: torch.Generator, layout: str) -> Tensor:
    """qkv (B, N, 3, H, d), contiguous or as the projector's convolutions leave it: only d has unit stride."""
    batch, n, n_heads, width = shape
    if layout == "dense":
        return torch.randn(batch, n, 3, n_heads, width, generator=draw)
    return torch.randn(3, batch, n, n_heads, width + 16, generator=draw)[..., :width].permute(
        1, 2, 0, 3, 4
    )


def case(
    shape: tuple[int, int, int, int], granularity: str, p: float, layout: str
) -> dict[str, object]:
    """Every kernel on one input."""
    draw = torch.Generator().manual_seed(hash((shape, p)) % 1000)
    s, t = packed(shape, draw, layout), packed(shape, draw, layout)
    batch, n, n_heads, width = shape
    key = Key(2**62 + 12345, torch.tensor([900, 7][:batch]), 41)
    told = (key.ids, key.stream(), p, granularity)
    exact_s = s.double().requires_grad_()
    attention, vv = reference.pca_loss(exact_s, t.double(), key, p, granularity)
    (d_attention,) = torch.autograd.grad(attention, exact_s, retain_graph=True)
    (d_gram,) = torch.autograd.grad(vv, exact_s)
    count, errors = batch * n * n_heads * width, {}
    mixed = swap_mix.swap_mix(s, t, *told)
    errors["mix"] = float(not torch.equal(mixed, reference.swap_mix(s, t, key, p, granularity)))
    zeros = swap_mix.swap_mix(s, None, *told)
    mask = reference.swap_masks(key, s.shape, p, granularity)
    errors["mix backward"] = float(not torch.equal(zeros, torch.where(mask, 0.0, s)))
    loss, gradient = gram.gram(s[:, :, 2], t[:, :, 2])
    errors["gram"] = relative(loss, vv)
    errors["gram gradient"] = relative(gradient / count, d_gram[:, :, 2])
    kernels: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {"flash": flash.flash}
    if n <= small.MOST_TOKENS:
        kernels["small"] = small.small
    for name, kernel in kernels.items():
        loss, gradient = kernel(s, t, *told)
        again, same = kernel(s, t, *told)
        errors[name] = relative(loss, attention)
        errors[f"{name} gradient"] = relative(gradient / count, d_attention)
        errors[f"{name} again"] = float(
            not (torch.equal(loss, again) and torch.equal(gradient, same))
        )
    return {"shape": shape, "granularity": granularity, "p": p, "layout": layout, "errors": errors}


def main(args: argparse.Namespace) -> None:
    """All shapes with an even draw, and every draw on the smallest; quick, or with a mutant, two cases of them."""
    empty = torch.empty
    torch.empty = lambda *shape, **kind: empty(*shape, **kind).fill_(float("nan"))
    cases = [(SHAPES[0], "element", 0.5, "dense"), (SHAPES[3], "element", 0.5, "strided")]
    if args.mutant:
        plant(args.mutant)
    elif args.scope == "all":
        cases = [(s, "element", 0.5, "strided") for s in SHAPES]
        cases += [(SHAPES[0], g, p, "dense") for g, p in DRAWS]
    for one in cases:
        print(json.dumps(case(*one)), flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="tests.interpreted", description=__doc__)
    parser.add_argument("--mutant", choices=sorted(MUTANTS))
    parser.add_argument("--scope", choices=("quick", "all"), default="quick")
    main(parser.parse_args())
