"""Both attentions, their squared distance, and all three gradients in one launch, where a head fits one program.

For N <= 64. With E = O_S - O_T the loss is mean(E^2), so its gradient needs nothing from later on:
dO = 2 E, delta = rowsum(dO * O_S), dV = P^T dO, dS = P * (dO g(V)^T - delta), dQ = s dS g(K),
dK = s dS^T g(Q); zero where g() took the teacher's element. Gradients are in units of 1 / count, which half
precision would lose; the backward puts it in with the upstream scalar.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.tiles import draws, mixed_tile, padded, settings


@triton.jit(do_not_specialize=["digits", "first"])
def small_kernel(
    student,
    teacher,
    gradient,
    losses,
    ids,
    stream,
    digits,
    first,
    count,
    n,
    s_b,
    s_n,
    s_m,
    s_h,
    t_b,
    t_n,
    t_m,
    t_h,
    g_b,
    g_n,
    g_m,
    g_h,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Packed qkv (B, N, 3, H, d) of both -> losses (B * H,) to be summed, count * d loss / d qkv_S."""
    head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    gradient += slot * g_b + head * g_h
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    real = rows < n
    inside = real[:, None] & (columns < WIDTH)[None, :]
    at_g = rows[:, None] * g_n + columns[None, :]
    identity, now, key = tl.load(ids + slot), tl.load(stream + 1), tl.load(stream)
    kind = student.dtype.element_ty

    q, q_t, took_q = mixed_tile(
        *(student, teacher, s_n, t_n, rows, columns, inside),
        *(head, n, 0, identity, now, key, digits, first, GRAN),
    )
    k, k_t, took_k = mixed_tile(
        *(student + s_m, teacher + t_m, s_n, t_n, rows, columns, inside),
        *(head, n, 1, identity, now, key, digits, first, GRAN),
    )
    v, v_t, took_v = mixed_tile(
        *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, rows, columns, inside),
        *(head, n, 2, identity, now, key, digits, first, GRAN),
    )
    p_t = _attend(q_t, k_t, real, SCALE, PRECISION)
    o_t = tl.dot(p_t.to(kind), v_t, input_precision=PRECISION)
    p = _attend(q, k, real, SCALE, PRECISION)
    o = tl.dot(p.to(kind), v, input_precision=PRECISION)

    e = tl.where(inside, o - o_t, 0.0)
    tl.store(losses + tl.program_id(1) * tl.num_programs(0) + head, tl.sum(e * e) / count)
    delta = tl.sum(2 * e * o, axis=1)
    d_o = (2 * e).to(kind)
    d_v = tl.dot(tl.trans(p.to(kind)), d_o, input_precision=PRECISION)
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    d_s = (p * (d_p - delta[:, None])).to(kind)
    d_q = tl.dot(d_s, k, input_precision=PRECISION) * SCALE
    d_k = tl.dot(tl.trans(d_s), q, input_precision=PRECISION) * SCALE
    tl.store(gradient + at_g, tl.where(took_q, 0.0, d_q).to(gradient.dtype.element_ty), mask=inside)
    tl.store(
        gradient + g_m + at_g, tl.where(took_k, 0.0, d_k).to(gradient.dtype.element_ty), mask=inside
    )
    tl.store(
        gradient + 2 * g_m + at_g,
        tl.where(took_v, 0.0, d_v).to(gradient.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def _attend(q, k, real, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(Q K^T s) (BLOCK, BLOCK) float32 over the real keys."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    scores = tl.where(real[None, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return scores / tl.sum(scores, axis=1)[:, None]


def small(
    qkv_s: Tensor, qkv_t: Tensor, ids: Tensor, stream: Tensor, p: float, granularity: str
) -> tuple[Tensor, Tensor]:
    """The attention term of `reference.pca_loss`, float32 scalar, and its gradient times B H N d. N <= 64."""
    batch, n, _, n_heads, width = qkv_s.shape
    gradient = torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)
    losses = torch.empty(batch * n_heads, dtype=torch.float32, device=qkv_s.device)
    _, options, precision = settings("small", qkv_s)
    drawn, granular = draws(ids, stream, p, granularity)
    small_kernel[(n_heads, batch)](
        *(qkv_s, qkv_t, gradient, losses, *drawn, float(batch * n_heads * n * width), n),
        *(*qkv_s.stride()[:4], *qkv_t.stride()[:4], *gradient.stride()[:4]),
        SCALE=width**-0.5,
        WIDTH=width,
        COLUMNS=padded(width),
        BLOCK=padded(n),
        GRAN=granular,
        PRECISION=precision,
        **options,
    )
    return losses.sum(), gradient
