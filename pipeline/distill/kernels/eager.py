"""The projector losses with their gradients in closed form, in plain torch: what a CPU runs.

As the Triton kernels do, the forward computes the gradient too, a few samples at a time, so that nothing of the
size N x N outlives the call. Gradients come in units of 1 / (B H N d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distill.kernels.philox import Key
from pipeline.distill.kernels.reference import Granularity, attention, swap_masks

SCORES = 1 << 22  # elements of an (b, H, N, N) tensor that exist at once


def attention_loss(
    qkv_s: Tensor, qkv_t: Tensor, key: Key, p: float, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """The attention term of eq. 4 of packed qkv (B, N, 3, H, d): the loss, scalar, and its gradient times B H N d.

    With E = O_S - O_T: dV = P^T 2 E; dS = P * (2 E g(V)^T - rowsum(2 E * O_S)); dQ = s dS g(K); dK = s dS^T g(Q);
    zero where g() took the teacher's element.
    """
    batch, n, _, n_heads, width = qkv_s.shape
    packed = torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)
    ours, theirs, gradient = (v.permute(2, 0, 3, 1, 4) for v in (qkv_s, qkv_t, packed))
    taken = swap_masks(key, qkv_s.shape, p, granularity).permute(2, 0, 3, 1, 4)
    at_once = max(1, SCORES // (n_heads * n * n))
    total = qkv_s.new_zeros((), dtype=torch.promote_types(qkv_s.dtype, torch.float32))
    for start in range(0, batch, at_once):
        part = slice(start, start + at_once)
        mask = taken[:, part] if taken.shape[1] > 1 else taken
        own = (~mask).to(qkv_s.dtype)
        squares, of_part = _attention_part(ours[:, part], theirs[:, part], own)
        total += squares
        gradient[:, part] = of_part
    return total / (batch * n_heads * n * width), packed


def _attention_part(ours: Tensor, theirs: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares of the error, and its gradient, of Q, K, V as one (3, b, H, N, d); `own` 1 or 0.

    `lerp` by 1 or 0 gives one or the other exactly, several times as fast as `where` on a CPU.
    """
    theirs = theirs.contiguous()
    q, k, v = torch.lerp(theirs, ours.contiguous(), own).flatten(1, 2)
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (q @ k.mT).mul_(scale).softmax(-1)
    out = weights @ v
    error = out - attention(*theirs.flatten(1, 2))
    d_out = 2 * error
    d_scores = (d_out @ v.mT).sub_((d_out * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    gradient = torch.empty_like(theirs)
    for part, left, right in zip(
        gradient.flatten(1, 2), (d_scores, d_scores.mT, weights.mT), (k, q, d_out), strict=True
    ):
        torch.bmm(left, right, out=part)
    wide = torch.promote_types(error.dtype, torch.float32)
    return error.square().sum(dtype=wide), gradient.mul_(own)


def gram_loss(v_s: Tensor, v_t: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram term of eq. 4 of V (B, N, H, d): the loss, scalar, and its gradient times B H N d.

    In the difference/mean form of `reference.gram_loss`; d/dV_S = -4 [R (M^T M - G / 2) + M (G^T - R^T R / 2)].
    """
    batch, n, n_heads, width = v_s.shape
    ours, theirs = v_s.transpose(1, 2), v_t.transpose(1, 2)
    r, m = theirs - ours, (theirs + ours) / 2
    rr, mm, g = r.mT @ r, m.mT @ m, m.mT @ r
    wide = torch.promote_types(rr.dtype, torch.float32)
    total = 2 * ((rr * mm).sum(dtype=wide) + (g * g.mT).sum(dtype=wide))
    gradient = (r @ (mm - g / 2) + m @ (g.mT - rr / 2)) * (-4 / n)
    return total / (batch * n_heads * n**2 * width), gradient.transpose(1, 2)


def group_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor | None,
    order: Sequence[int],
    sizes: Sequence[int],
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """mse(Proj2(x), target), scalar; Proj2(x) (B, N, D); their difference, empty without a target.

    x (B, N, c) is permuted once, so that each group's rows are side by side: one product a group, or one
    `grouped_mm` for all of them.
    """
    rows = _by_group(x, order)
    if grouped:
        flat = F.grouped_mm(rows.flatten(0, 1), weight.mT, offs=_ends(rows, sizes))
        out = flat.unflatten(0, rows.shape[:2])
        of_place = (group for group, size in enumerate(sizes) for _ in range(size))
        out += bias.index_select(0, constant(x.device, *of_place))[:, None]
    else:
        out = rows.new_empty(*rows.shape[:2], weight.shape[1])
        for part, into, w, b in zip(rows.split(sizes), out.split(sizes), weight, bias, strict=True):
            torch.addmm(b, part.flatten(0, 1), w.mT, out=into.view(-1, w.shape[0]))
    projected = _by_image(out, order)
    wide = torch.promote_types(x.dtype, torch.float32)
    if target is None:
        return x.new_zeros((), dtype=wide), projected, x.new_empty(0)
    residual = projected - target
    return residual.square().mean(dtype=wide), projected, residual


def group_linear_backward(
    x: Tensor,
    weight: Tensor,
    upstream: Tensor,
    order: Sequence[int],
    sizes: Sequence[int],
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of upstream (B, N, D): d x (B, N, c), d weight (G, D, c), d bias (G, D)."""
    rows, d_out = _by_group(x, order), _by_group(upstream, order)
    if grouped:
        ends, flat = _ends(rows, sizes), d_out.flatten(0, 1)
        d_rows = F.grouped_mm(flat, weight, offs=ends).unflatten(0, rows.shape[:2])
        d_weight = F.grouped_mm(flat.mT, rows.flatten(0, 1), offs=ends)
    else:
        d_rows, d_weight = torch.empty_like(rows), torch.empty_like(weight)
        parts = (rows.split(sizes), d_out.split(sizes), d_rows.split(sizes))
        for part, d_part, into, w, d_w in zip(*parts, weight, d_weight, strict=True):
            torch.mm(d_part.flatten(0, 1), w, out=into.view(-1, w.shape[1]))
            torch.mm(d_part.flatten(0, 1).mT, part.flatten(0, 1), out=d_w)
    d_bias = torch.stack([part.sum((0, 1)) for part in d_out.split(sizes)])
    return _by_image(d_rows, order), d_weight, d_bias


@lru_cache(maxsize=64)
def constant(device: torch.device, *numbers: int) -> Tensor:
    """A table (int64) copied to the device the first time; under CUDA graphs that must be before the capture."""
    return torch.tensor(numbers).to(device)


def _by_group(x: Tensor, order: Sequence[int]) -> Tensor:
    """Tokens (B, N, c) -> (N, B, c), each group's side by side, in one copy."""
    batch, n, _ = x.shape
    starts = torch.arange(0, batch * n, n, device=x.device)
    rows = constant(x.device, *order)[:, None] + starts
    return x.flatten(0, 1).index_select(0, rows.flatten()).view(n, batch, -1)


def _by_image(rows: Tensor, order: Sequence[int]) -> Tensor:
    """The way back: (N, B, c) -> (B, N, c)."""
    n, batch, _ = rows.shape
    inverse = sorted(range(n), key=order.__getitem__)
    indices = (
        constant(rows.device, *inverse) * batch + torch.arange(batch, device=rows.device)[:, None]
    )
    return rows.flatten(0, 1).index_select(0, indices.flatten()).view(batch, n, -1)


def _ends(rows: Tensor, sizes: Sequence[int]) -> Tensor:
    """End offset of each group's rows in N B, as grouped_mm reads it."""
    return constant(rows.device, *(rows.shape[1] * end for end in accumulate(sizes))).int()
