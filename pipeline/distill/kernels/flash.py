"""Both attentions and the student's gradients for any N, no N x N tensor in memory: three kernels, g() on the fly.

`forward` runs the two softmaxes side by side and leaves what the gradients need: 2 E, the student's log-sum-exp
and delta = rowsum(2 E * O_S). `queries` and `keys` are the halves of the backward, each tile owned by one program,
so that nothing is added atomically. Gradients are in units of 1 / count, as in `small`.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.tiles import draws, mixed_tile, padded, settings


@triton.jit(do_not_specialize=["digits", "first"])
def flash_forward_kernel(
    student,
    teacher,
    doubled,
    log_sums,
    deltas,
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
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Packed qkv of both -> 2 E (B, H, N, d), log_sums and deltas (B, H, N), losses (programs,) to be summed."""
    block, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    index = slot * tl.num_programs(1) + head
    rows, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    identity, now, key = tl.load(ids + slot), tl.load(stream + 1), tl.load(stream)
    kind = student.dtype.element_ty

    q, q_t, took_q = mixed_tile(
        *(student, teacher, s_n, t_n, rows, columns, inside),
        *(head, n, 0, identity, now, key, digits, first, GRAN),
    )
    low = tl.full((BLOCK,), float("-inf"), tl.float32)
    top_s, sum_s = low, tl.zeros((BLOCK,), tl.float32)
    out_s = tl.zeros((BLOCK, COLUMNS), tl.float32)
    top_t, sum_t, out_t = top_s, sum_s, out_s
    for start in range(0, n, KEYS):
        others = start + tl.arange(0, KEYS)
        here = (others < n)[:, None] & (columns < WIDTH)[None, :]
        k, k_t, took_k = mixed_tile(
            *(student + s_m, teacher + t_m, s_n, t_n, others, columns, here),
            *(head, n, 1, identity, now, key, digits, first, GRAN),
        )
        v, v_t, took_v = mixed_tile(
            *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, others, columns, here),
            *(head, n, 2, identity, now, key, digits, first, GRAN),
        )
        real = (others < n)[None, :]
        top_s, sum_s, out_s = _add_keys(q, k, v, real, top_s, sum_s, out_s, SCALE, PRECISION)
        top_t, sum_t, out_t = _add_keys(q_t, k_t, v_t, real, top_t, sum_t, out_t, SCALE, PRECISION)
    out_s = out_s / sum_s[:, None]
    e = tl.where(inside, out_s - out_t / sum_t[:, None], 0.0)
    tl.store(losses + index * tl.num_programs(0) + block, tl.sum(e * e) / count)
    at = index * n * WIDTH + rows[:, None] * WIDTH + columns[None, :]
    tl.store(doubled + at, (2 * e).to(kind), mask=inside)
    tl.store(log_sums + index * n + rows, top_s + tl.log(sum_s), mask=rows < n)
    tl.store(deltas + index * n + rows, tl.sum(2 * e * out_s, axis=1), mask=rows < n)


@triton.jit
def _add_keys(q, k, v, real, top, total, out, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: running maximum, sum and weighted values with these keys taken in."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    scores = tl.where(real, scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp(scores - higher[:, None])
    shrink = tl.exp(top - higher)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, axis=1), out


@triton.jit(do_not_specialize=["digits", "first"])
def flash_queries_kernel(
    student,
    teacher,
    doubled,
    log_sums,
    deltas,
    gradient,
    ids,
    stream,
    digits,
    first,
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
    g_h,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradient of BLOCK queries: dQ = s sum over the keys of P * (2 E g(V)^T - delta) g(K)."""
    block, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    gradient += slot * g_b + head * g_h
    index = slot * tl.num_programs(1) + head
    rows, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    identity, now, key = tl.load(ids + slot), tl.load(stream + 1), tl.load(stream)
    q, q_t, took_q = mixed_tile(
        *(student, teacher, s_n, t_n, rows, columns, inside),
        *(head, n, 0, identity, now, key, digits, first, GRAN),
    )
    at = index * n * WIDTH + rows[:, None] * WIDTH + columns[None, :]
    d_o = tl.load(doubled + at, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + index * n + rows, mask=rows < n, other=0.0)
    delta = tl.load(deltas + index * n + rows, mask=rows < n, other=0.0)
    d_q = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, n, KEYS):
        others = start + tl.arange(0, KEYS)
        here = (others < n)[:, None] & (columns < WIDTH)[None, :]
        k, k_t, took_k = mixed_tile(
            *(student + s_m, teacher + t_m, s_n, t_n, others, columns, here),
            *(head, n, 1, identity, now, key, digits, first, GRAN),
        )
        v, v_t, took_v = mixed_tile(
            *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, others, columns, here),
            *(head, n, 2, identity, now, key, digits, first, GRAN),
        )
        p, d_s = _weights(q, k, v, d_o, log_sum, delta, rows < n, others < n, SCALE, PRECISION)
        d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
    d_q = tl.where(took_q, 0.0, d_q * SCALE).to(gradient.dtype.element_ty)
    tl.store(gradient + rows[:, None] * g_n + columns[None, :], d_q, mask=inside)


@triton.jit(do_not_specialize=["digits", "first"])
def flash_keys_kernel(
    student,
    teacher,
    doubled,
    log_sums,
    deltas,
    gradient,
    ids,
    stream,
    digits,
    first,
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
    KEYS: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The gradients of KEYS keys and values: dV = sum over the queries of P^T 2 E, dK = s dS^T g(Q)."""
    block, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    gradient += slot * g_b + head * g_h
    index = slot * tl.num_programs(1) + head
    others, columns = block * KEYS + tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    here = (others < n)[:, None] & (columns < WIDTH)[None, :]
    identity, now, key = tl.load(ids + slot), tl.load(stream + 1), tl.load(stream)
    k, k_t, took_k = mixed_tile(
        *(student + s_m, teacher + t_m, s_n, t_n, others, columns, here),
        *(head, n, 1, identity, now, key, digits, first, GRAN),
    )
    v, v_t, took_v = mixed_tile(
        *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, others, columns, here),
        *(head, n, 2, identity, now, key, digits, first, GRAN),
    )
    d_k = tl.zeros((KEYS, COLUMNS), tl.float32)
    d_v = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        q, q_t, took_q = mixed_tile(
            *(student, teacher, s_n, t_n, rows, columns, inside),
            *(head, n, 0, identity, now, key, digits, first, GRAN),
        )
        at = index * n * WIDTH + rows[:, None] * WIDTH + columns[None, :]
        d_o = tl.load(doubled + at, mask=inside, other=0.0)
        log_sum = tl.load(log_sums + index * n + rows, mask=rows < n, other=0.0)
        delta = tl.load(deltas + index * n + rows, mask=rows < n, other=0.0)
        p, d_s = _weights(q, k, v, d_o, log_sum, delta, rows < n, others < n, SCALE, PRECISION)
        d_v = tl.dot(tl.trans(p.to(d_o.dtype)), d_o, d_v, input_precision=PRECISION)
        d_k = tl.dot(tl.trans(d_s.to(q.dtype)), q, d_k, input_precision=PRECISION)
    at = others[:, None] * g_n + columns[None, :]
    kind = gradient.dtype.element_ty
    d_k = tl.where(took_k, 0.0, d_k * SCALE).to(kind)
    d_v = tl.where(took_v, 0.0, d_v).to(kind)
    tl.store(gradient + g_m + at, d_k, mask=here)
    tl.store(gradient + 2 * g_m + at, d_v, mask=here)


@triton.jit
def _weights(
    q,
    k,
    v,
    d_o,
    log_sum,
    delta,
    real_rows,
    real_keys,
    SCALE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """P and dS (queries, keys) float32 of one tile, from the log-sum-exp of its rows."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * SCALE
    real = real_rows[:, None] & real_keys[None, :]
    p = tl.where(real, tl.exp(scores - log_sum[:, None]), 0.0)
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    return p, p * (d_p - delta[:, None])


def flash(
    qkv_s: Tensor, qkv_t: Tensor, ids: Tensor, stream: Tensor, p: float, granularity: str
) -> tuple[Tensor, Tensor]:
    """The attention term of `reference.pca_loss`, float32 scalar, and its gradient times B H N d. Any N."""
    batch, n, _, n_heads, width = qkv_s.shape
    gradient = torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)
    tiling, options, precision = settings("flash_forward", qkv_s)
    blocks = triton.cdiv(n, tiling.block)
    losses, log_sums, deltas = (
        torch.empty(batch * n_heads * count, dtype=torch.float32, device=qkv_s.device)
        for count in (blocks, n, n)
    )
    doubled = torch.empty(batch, n_heads, n, width, dtype=qkv_s.dtype, device=qkv_s.device)
    drawn, granular = draws(ids, stream, p, granularity)
    count, common = (
        float(batch * n_heads * n * width),
        (n, *qkv_s.stride()[:4], *qkv_t.stride()[:4]),
    )
    fixed = {
        "SCALE": width**-0.5,
        "WIDTH": width,
        "COLUMNS": padded(width),
        "GRAN": granular,
        "PRECISION": precision,
    }
    flash_forward_kernel[(blocks, n_heads, batch)](
        *(qkv_s, qkv_t, doubled, log_sums, deltas, losses, *drawn, count, *common),
        BLOCK=tiling.block,
        KEYS=tiling.inner,
        **fixed,
        **options,
    )
    saved = (qkv_s, qkv_t, doubled, log_sums, deltas, gradient, *drawn, *common)
    g_b, g_n, g_m, g_h = gradient.stride()[:4]
    tiling, options, _ = settings("flash_queries", qkv_s)
    flash_queries_kernel[(triton.cdiv(n, tiling.block), n_heads, batch)](
        *(*saved, g_b, g_n, g_h), BLOCK=tiling.block, KEYS=tiling.inner, **fixed, **options
    )
    tiling, options, _ = settings("flash_keys", qkv_s)
    flash_keys_kernel[(triton.cdiv(n, tiling.inner), n_heads, batch)](
        *(*saved, g_b, g_n, g_m, g_h), BLOCK=tiling.block, KEYS=tiling.inner, **fixed, **options
    )
    return losses.sum(), gradient
