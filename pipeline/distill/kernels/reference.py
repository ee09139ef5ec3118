"""Reference implementation: every projector loss in plain torch, as the paper's equations state it.

Shapes: B batch, N tokens, H heads, d head width, D = H d, c student channels, G groups.
A packed qkv is (B, N, 3, H, d); Q, K, V of one model are (B, H, N, d).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.distill.kernels.philox import Key, bernoulli, rounded

Granularity = Literal["element", "token", "matrix", "none"]
DROPOUT_TENSOR = 3  # Q, K, V are 0, 1, 2


def heads(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Packed (B, N, 3, H, d) -> Q, K, V, each (B, H, N, d)."""
    q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return q, k, v


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V (B, H, N, d), eq. 2: the attention output, not the map."""
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
    return scores.softmax(dim=-1) @ v


def swap_masks(key: Key, shape: Sequence[int], p: float, granularity: Granularity) -> Tensor:
    """Masks (B, N, 3, H, d) bool (broadcastable): True where g() takes the teacher's value, eq. 3.

    `element`: each (i, j) of each matrix (the paper's text); `token`: whole rows i; `matrix`: Q, K or V as one;
    `none`: never. Independent for Q, K, V, each sample and step.
    """
    batch, tokens, _, n_heads, width = shape
    if granularity == "none":
        return torch.zeros(1, 1, 1, 1, 1, dtype=torch.bool, device=key.ids.device)
    if granularity == "element":
        masks = [bernoulli(key, n_heads * tokens, width, t, p) for t in range(3)]
        shaped = [m.reshape(batch, n_heads, tokens, width) for m in masks]
    else:
        rows = tokens if granularity == "token" else 1
        shaped = [bernoulli(key, rows, 1, t, p)[:, None] for t in range(3)]
    return torch.stack(shaped).permute(1, 3, 0, 2, 4)


def swap_mix(
    qkv_s: Tensor, qkv_t: Tensor, key: Key, p: float = 0.5, granularity: Granularity = "element"
) -> Tensor:
    """g() of eq. 3 on packed qkv (B, N, 3, H, d): the student's, with the teacher's where the mask says."""
    return torch.where(swap_masks(key, qkv_s.shape, p, granularity), qkv_t, qkv_s)


def gram_loss(v_s: Tensor, v_t: Tensor) -> Tensor:
    """mse(V_T V_T^T / sqrt(d), V_S V_S^T / sqrt(d)), the second term of eq. 4; V (B, H, N, d) -> scalar.

    In the difference/mean form: with R = V_T - V_S and M = (V_T + V_S) / 2 the difference of the two Gram
    matrices is R M^T + M R^T, whose squared norm is 2 (<R^T R, M^T M> + <G, G^T>), G = M^T R. Only d x d
    products, and no cancellation when the student nears the teacher.
    """
    batch, n_heads, tokens, width = v_s.shape
    r, m = v_t - v_s, (v_t + v_s) / 2
    rr, mm, g = r.mT @ r, m.mT @ m, m.mT @ r
    total = 2 * ((rr * mm).sum() + (g * g.mT).sum())
    return total / (batch * n_heads * tokens**2 * width)


def pca_loss(
    qkv_s: Tensor, qkv_t: Tensor, key: Key, p: float = 0.5, granularity: Granularity = "element"
) -> tuple[Tensor, Tensor]:
    """The two terms of L_proj1, eq. 4, unweighted: attention (with g()) and Gram (without), scalars.

    qkv_s (B, N, 3, H, d) with gradient, qkv_t the same shape, detached.
    """
    mixed = swap_mix(qkv_s, qkv_t, key, p, granularity)
    loss = F.mse_loss(attention(*heads(mixed)), attention(*heads(qkv_t)))
    return loss, gram_loss(heads(qkv_s)[2], heads(qkv_t)[2])


def gl_project(x: Tensor, weight: Tensor, bias: Tensor, groups: Sequence[Sequence[int]]) -> Tensor:
    """Group-wise linear, eq. 5: x (B, N, c), weight (G, D, c), bias (G, D) -> (B, N, D).

    groups[g] lists the tokens that share layer g; the lists partition 0..N-1. Tokens are permuted once, so each
    group is one contiguous product.
    """
    order = torch.tensor([t for g in groups for t in g], device=x.device)
    inputs = x[:, order].split([len(g) for g in groups], dim=1)
    outputs = [F.linear(x_g, w, b) for x_g, w, b in zip(inputs, weight, bias, strict=True)]
    return torch.cat(outputs, dim=1)[:, order.argsort()]


def dropout(x: Tensor, key: Key, p: float) -> Tensor:
    """Dropout of x (B, N, c) with a mask keyed as the swap masks are: same sample and step, same mask."""
    if p == 0:
        return x
    keep = bernoulli(key, x.shape[1], x.shape[2], DROPOUT_TENSOR, 1 - p)
    return keep.to(x.dtype) * x / rounded(1 - p)


def gl_mse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    groups: Sequence[Sequence[int]],
    dropout_p: float,
    key: Key,
) -> tuple[Tensor, Tensor]:
    """L_proj2 of eq. 6 and its projection h'_S: mse(h_T, Proj2(dropout(x))) scalar, (B, N, D)."""
    projected = gl_project(dropout(x, key, dropout_p), weight, bias, groups)
    return F.mse_loss(projected, target), projected
