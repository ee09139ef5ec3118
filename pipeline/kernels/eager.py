"""The projector losses with their gradients in closed form, in plain torch: what a CPU runs.

As the Triton kernels do, the forward computes the gradient too, a few samples at a time, so that nothing of the
size N x N outlives the call. Gradients come in units of 1 / (B H N d).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.kernels.philox import Key
from pipeline.kernels.reference import Granularity, attention, heads, swap_masks

SCORES = 1 << 22  # elements of an (b, H, N, N) tensor that exist at once


def attention_loss(
    qkv_s: Tensor, qkv_t: Tensor, key: Key, p: float, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """The attention term of eq. 4 of packed qkv (B, N, 3, H, d): the loss, scalar, and its gradient times B H N d.

    With E = O_S - O_T: dV = P^T 2 E; dS = P * (2 E g(V)^T - rowsum(2 E * O_S)); dQ = s dS g(K); dK = s dS^T g(Q);
    zero where g() took the teacher's element.
    """
    batch, n, _, n_heads, width = qkv_s.shape
    taken = swap_masks(key, qkv_s.shape, p, granularity)
    at_once = max(1, SCORES // (n_heads * n * n))
    gradient = torch.empty_like(qkv_s)
    total = qkv_s.new_zeros((), dtype=torch.promote_types(qkv_s.dtype, torch.float32))
    for start in range(0, batch, at_once):
        part = slice(start, start + at_once)
        mask = taken[part] if len(taken) > 1 or batch == 1 else taken
        mixed = torch.where(mask, qkv_t[part], qkv_s[part])
        loss, d_qkv = _attention_part(mixed, qkv_t[part])
        total += loss
        gradient[part] = d_qkv.masked_fill_(mask, 0)
    return total / (batch * n_heads * n * width), gradient


def _attention_part(mixed: Tensor, qkv_t: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares and its gradient (b, N, 3, H, d), g() already taken."""
    q, k, v = heads(mixed)
    scale = 1 / math.sqrt(q.shape[-1])
    weights = (q @ k.mT).mul_(scale).softmax(-1)
    out = weights @ v
    error = out - attention(*heads(qkv_t))
    d_out = 2 * error
    d_scores = (d_out @ v.mT).sub_((d_out * out).sum(-1, keepdim=True)).mul_(weights).mul_(scale)
    grads = torch.stack((d_scores @ k, d_scores.mT @ q, weights.mT @ d_out), dim=2)
    return (error * error).sum(
        dtype=torch.promote_types(error.dtype, torch.float32)
    ), grads.permute(0, 3, 2, 1, 4)


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
