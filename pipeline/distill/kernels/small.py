"""L_proj1 of eq. 4 where a head fits one program (N <= 64): one launch for the losses, one for the gradient.

A program takes one head of one sample: both attentions and both Gram matrices stay in its registers, each
tensor is read once a launch, and nothing is left in memory between the two. With E = O_S - O_T and dO = 2 E:
delta = rowsum(dO * O_S), dV = P^T dO, dS = P * (dO g(V)^T - delta), dQ = s dS g(K), dK = s dS^T g(Q); zero
where g() took the teacher's element. With R = V_T - V_S and M = (V_T + V_S) / 2 the difference of the Gram
matrices is D = R M^T + M R^T, without cancellation near the teacher; its gradient is -4 D V_S.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.tiles import (
    arrivals,
    draws,
    finish_sums,
    mixed_tile,
    padded,
    settings,
    through_mask,
)


@triton.jit(do_not_specialize=["digits", "first"])
def small_losses_kernel(
    student,
    teacher,
    partial,
    loss,
    loss_gram,
    arrived,
    ids,
    stream,
    digits,
    first,
    of_attention,
    of_gram,
    n,
    s_b,
    s_n,
    s_m,
    s_h,
    t_b,
    t_n,
    t_m,
    t_h,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Packed qkv (B, N, 3, H, d) of both -> of_attention sum E^2 and of_gram sum (s D)^2, scalars."""
    head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    d = _gram_difference(
        *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, rows, columns, inside),
        *(SCALE, PRECISION),
    )[0]
    programs = tl.num_programs(0) * tl.num_programs(1)
    index = tl.program_id(1) * tl.num_programs(0) + head
    tl.store(partial + programs + index, tl.sum(d * d) * of_gram)
    drawn = (head, n, tl.load(ids + slot), tl.load(stream + 1), tl.load(stream), digits, first)
    e = _attentions(
        *(student, teacher, s_n, s_m, t_n, t_m, drawn),
        *(SCALE, WIDTH, COLUMNS, BLOCK, GRAN, PRECISION),
    )[5]
    tl.store(partial + index, tl.sum(e * e) * of_attention)
    finish_sums(partial, loss, loss_gram, arrived, programs, 2)


@triton.jit(do_not_specialize=["digits", "first"])
def small_gradient_kernel(
    student,
    teacher,
    up_attention,
    up_gram,
    gradient,
    ids,
    stream,
    digits,
    first,
    of_attention,
    of_gram,
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
    """The gradient (B, N, 3, H, d) of up_attention times the one loss plus up_gram times the other."""
    head, slot = tl.program_id(0), tl.program_id(1).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    gradient += slot * g_b + head * g_h
    drawn = (head, n, tl.load(ids + slot), tl.load(stream + 1), tl.load(stream), digits, first)
    q, k, v, p, o, e = _attentions(
        *(student, teacher, s_n, s_m, t_n, t_m, drawn),
        *(SCALE, WIDTH, COLUMNS, BLOCK, GRAN, PRECISION),
    )
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    at = gradient + rows[:, None] * g_n + columns[None, :]
    kind = student.dtype.element_ty
    attention = tl.load(up_attention).to(tl.float32) * of_attention
    delta = tl.sum(2 * e * o, axis=1)
    d_o, weights = (2 * e).to(kind), p.to(kind)
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    d_s = (p * (d_p - delta[:, None])).to(kind)
    again = (ids + slot, stream, digits, first)
    d_q = tl.dot(d_s, k, input_precision=PRECISION) * (SCALE * attention)
    d_q = through_mask(d_q, rows, columns, head, n, 0, *again, GRAN)
    tl.store(at, d_q.to(kind), mask=inside)
    d_k = tl.dot(tl.trans(d_s), q, input_precision=PRECISION) * (SCALE * attention)
    d_k = through_mask(d_k, rows, columns, head, n, 1, *again, GRAN)
    tl.store(at + g_m, d_k.to(kind), mask=inside)
    d, v_s = _gram_difference(
        *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, rows, columns, inside),
        *(SCALE, PRECISION),
    )
    d_v = tl.dot(tl.trans(weights), d_o, input_precision=PRECISION) * attention
    d_v = through_mask(d_v, rows, columns, head, n, 2, *again, GRAN)
    gram = tl.load(up_gram).to(tl.float32) * (-4 * of_gram)
    d_v += tl.dot((d * SCALE).to(kind), v_s, input_precision=PRECISION) * gram
    tl.store(at + 2 * g_m, d_v.to(kind), mask=inside)


@triton.jit
def _attentions(
    student,
    teacher,
    s_n,
    s_m,
    t_n,
    t_m,
    drawn,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """g(Q), g(K), g(V), P and O of the student, E."""
    head, n, identity, now, key, digits, first = drawn
    rows, columns = tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    real = rows < n
    inside = real[:, None] & (columns < WIDTH)[None, :]
    q, q_t, _ = mixed_tile(
        *(student, teacher, s_n, t_n, rows, columns, inside),
        *(head, n, 0, identity, now, key, digits, first, GRAN),
    )
    k, k_t, _ = mixed_tile(
        *(student + s_m, teacher + t_m, s_n, t_n, rows, columns, inside),
        *(head, n, 1, identity, now, key, digits, first, GRAN),
    )
    v, v_t, _ = mixed_tile(
        *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, rows, columns, inside),
        *(head, n, 2, identity, now, key, digits, first, GRAN),
    )
    p_t = _attend(q_t, k_t, real, SCALE, PRECISION)
    o_t = tl.dot(p_t.to(v.dtype), v_t, input_precision=PRECISION)
    p = _attend(q, k, real, SCALE, PRECISION)
    o = tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return q, k, v, p, o, tl.where(inside, o - o_t, 0.0)


@triton.jit
def _attend(q, k, real, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """softmax(Q K^T s) (BLOCK, BLOCK) float32 over the real keys."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    scores = tl.where(real[None, :], scores, float("-inf"))
    scores = tl.exp(scores - tl.max(scores, axis=1)[:, None])
    return scores / tl.sum(scores, axis=1)[:, None]


@triton.jit
def _gram_difference(
    student, teacher, s_n, t_n, rows, columns, inside, SCALE: tl.constexpr, PRECISION: tl.constexpr
):
    """s D = s (V_T V_T^T - V_S V_S^T) (BLOCK, BLOCK) float32, from difference and mean; and V_S."""
    v_s = tl.load(student + rows[:, None] * s_n + columns[None, :], mask=inside, other=0.0)
    v_t = tl.load(teacher + rows[:, None] * t_n + columns[None, :], mask=inside, other=0.0)
    ours, theirs = v_s.to(tl.float32), v_t.to(tl.float32)
    r, m = (theirs - ours).to(v_s.dtype), ((ours + theirs) / 2).to(v_s.dtype)
    half = tl.dot(r, tl.trans(m), input_precision=PRECISION) * SCALE
    return half + tl.trans(half), v_s


def losses(
    qkv_s: Tensor, qkv_t: Tensor, ids: Tensor, stream: Tensor, p: float, granularity: str
) -> tuple[Tensor, Tensor]:
    """Both terms of `reference.pca_loss`, attention and Gram, float32 scalars. N <= 64."""
    partial = torch.empty(2, qkv_s.shape[0] * qkv_s.shape[3], device=qkv_s.device)
    attention, gram = (torch.empty((), device=qkv_s.device) for _ in range(2))
    common, fixed = _arguments("small_losses", qkv_s, qkv_t, ids, stream, p, granularity)
    small_losses_kernel[(qkv_s.shape[3], qkv_s.shape[0])](
        *(qkv_s, qkv_t, partial, attention, gram, arrivals(qkv_s.device), *common), **fixed
    )
    return attention, gram


def gradient(
    qkv_s: Tensor,
    qkv_t: Tensor,
    up_attention: Tensor,
    up_gram: Tensor,
    ids: Tensor,
    stream: Tensor,
    p: float,
    granularity: str,
) -> Tensor:
    """The gradient of packed qkv_S, contiguous, by the upstream scalars of both terms. N <= 64."""
    found = torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)
    common, fixed = _arguments("small_gradient", qkv_s, qkv_t, ids, stream, p, granularity)
    small_gradient_kernel[(qkv_s.shape[3], qkv_s.shape[0])](
        qkv_s, qkv_t, up_attention, up_gram, found, *common, *found.stride()[:4], **fixed
    )
    return found


def _arguments(
    kernel: str,
    qkv_s: Tensor,
    qkv_t: Tensor,
    ids: Tensor,
    stream: Tensor,
    p: float,
    granularity: str,
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What both kernels take: draws, factors, sizes and strides; constants and launch options."""
    batch, n, _, n_heads, width = qkv_s.shape
    _, options, precision = settings(kernel, qkv_s)
    drawn, granular = draws(ids, stream, p, granularity)
    factors = 1 / (batch * n_heads * n * width), 1 / (batch * n_heads * n * n)
    fixed = {
        "SCALE": width**-0.5,
        "WIDTH": width,
        "COLUMNS": padded(width),
        "BLOCK": padded(n),
        "GRAN": granular,
        "PRECISION": precision,
    }
    return (*drawn, *factors, n, *qkv_s.stride()[:4], *qkv_t.stride()[:4]), fixed | options
