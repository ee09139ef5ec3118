"""The gradient of L_proj1 of eq. 4 for any N, from what `flash.losses` left: two launches.

`queries` and `keys` are its halves: each tile is owned by one program, so that nothing is added atomically. In the
first, one program more for each head writes the gradient of its Gram term (`gram.py`), to which `keys` adds.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.flash import LOG2_E, Saved, factors, fixed_arguments
from pipeline.distill.kernels.gram import gram_gradient, gram_products
from pipeline.distill.kernels.tiles import blocks, draws, mixed_tile, through_mask


@triton.jit(do_not_specialize=["digits", "first"])
def flash_queries_kernel(
    student,
    teacher,
    doubled,
    log_sums,
    deltas,
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
    KEYS: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dQ = s sum over the keys of P * (2 E g(V)^T - delta) g(K) of BLOCK queries; of one program, Gram's dV."""
    block, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    gradient += slot * g_b + head * g_h
    if block == tl.num_programs(0) - 1:
        v_s, v_t = student + 2 * s_m, teacher + 2 * t_m
        rr, mm, mr = gram_products(v_s, v_t, n, s_n, t_n, WIDTH, COLUMNS, KEYS, PRECISION)
        factor = tl.load(up_gram).to(tl.float32) * (-4 * of_gram)
        gram_gradient(
            *(v_s, v_t, gradient + 2 * g_m, rr, mm, mr, factor, n, s_n, t_n, g_n),
            *(WIDTH, COLUMNS, KEYS, PRECISION),
        )
    else:
        identity, now, key = tl.load(ids + slot), tl.load(stream + 1), tl.load(stream)
        rows, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
        inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        q = mixed_tile(
            *(student, teacher, s_n, t_n, rows, columns, inside),
            *(head, n, 0, identity, now, key, digits, first, GRAN),
        )[0]
        of_head = slot * tl.num_programs(1) + head
        d_o, log_sum, delta = _saved(
            doubled, log_sums, deltas, of_head, rows, columns, inside, n, WIDTH
        )
        d_q = tl.zeros((BLOCK, COLUMNS), tl.float32)
        for start in range(0, n, KEYS):
            others = start + tl.arange(0, KEYS)
            here = (others < n)[:, None] & (columns < WIDTH)[None, :]
            k = mixed_tile(
                *(student + s_m, teacher + t_m, s_n, t_n, others, columns, here),
                *(head, n, 1, identity, now, key, digits, first, GRAN),
            )[0]
            v = mixed_tile(
                *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, others, columns, here),
                *(head, n, 2, identity, now, key, digits, first, GRAN),
            )[0]
            p, d_s = _weights(q, k, v, d_o, log_sum, delta, rows < n, others < n, SCALE, PRECISION)
            d_q = tl.dot(d_s.to(k.dtype), k, d_q, input_precision=PRECISION)
        d_q *= SCALE * of_attention * tl.load(up_attention).to(tl.float32)
        d_q = through_mask(d_q, rows, columns, head, n, 0, ids + slot, stream, digits, first, GRAN)
        at = gradient + rows[:, None] * g_n + columns[None, :]
        tl.store(at, d_q.to(gradient.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["digits", "first"])
def flash_keys_kernel(
    student,
    teacher,
    doubled,
    log_sums,
    deltas,
    up_attention,
    gradient,
    ids,
    stream,
    digits,
    first,
    of_attention,
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
    """dK = s dS^T g(Q), and dV = sum over the queries of P^T 2 E added to Gram's, of KEYS keys and values."""
    block, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    gradient += slot * g_b + head * g_h
    of_head = slot * tl.num_programs(1) + head
    others, columns = block * KEYS + tl.arange(0, KEYS), tl.arange(0, COLUMNS)
    here = (others < n)[:, None] & (columns < WIDTH)[None, :]
    identity, now, key = tl.load(ids + slot), tl.load(stream + 1), tl.load(stream)
    k = mixed_tile(
        *(student + s_m, teacher + t_m, s_n, t_n, others, columns, here),
        *(head, n, 1, identity, now, key, digits, first, GRAN),
    )[0]
    v = mixed_tile(
        *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, others, columns, here),
        *(head, n, 2, identity, now, key, digits, first, GRAN),
    )[0]
    d_k = tl.zeros((KEYS, COLUMNS), tl.float32)
    d_v = tl.zeros((KEYS, COLUMNS), tl.float32)
    for start in range(0, n, BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        q = mixed_tile(
            *(student, teacher, s_n, t_n, rows, columns, inside),
            *(head, n, 0, identity, now, key, digits, first, GRAN),
        )[0]
        d_o, log_sum, delta = _saved(
            doubled, log_sums, deltas, of_head, rows, columns, inside, n, WIDTH
        )
        p, d_s = _weights(q, k, v, d_o, log_sum, delta, rows < n, others < n, SCALE, PRECISION)
        d_v = tl.dot(tl.trans(p.to(d_o.dtype)), d_o, d_v, input_precision=PRECISION)
        d_k = tl.dot(tl.trans(d_s.to(q.dtype)), q, d_k, input_precision=PRECISION)
    attention = tl.load(up_attention).to(tl.float32) * of_attention
    kind = gradient.dtype.element_ty
    at = gradient + g_m + others[:, None] * g_n + columns[None, :]
    again = (ids + slot, stream, digits, first)
    d_k = through_mask(d_k * (SCALE * attention), others, columns, head, n, 1, *again, GRAN)
    tl.store(at, d_k.to(kind), mask=here)
    d_v = through_mask(d_v * attention, others, columns, head, n, 2, *again, GRAN)
    d_v += tl.load(at + g_m, mask=here, other=0.0).to(tl.float32)
    tl.store(at + g_m, d_v.to(kind), mask=here)


@triton.jit
def _saved(doubled, log_sums, deltas, of_head, rows, columns, inside, n, WIDTH: tl.constexpr):
    """2 E (rows, columns), log-sum-exp and delta (rows,) of these queries of one head."""
    at = of_head * n * WIDTH + rows[:, None] * WIDTH + columns[None, :]
    d_o = tl.load(doubled + at, mask=inside, other=0.0)
    log_sum = tl.load(log_sums + of_head * n + rows, mask=rows < n, other=0.0)
    return d_o, log_sum, tl.load(deltas + of_head * n + rows, mask=rows < n, other=0.0)


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
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2_E)
    real = real_rows[:, None] & real_keys[None, :]
    p = tl.where(real, tl.exp2(scores - log_sum[:, None]), 0.0)
    d_p = tl.dot(d_o, tl.trans(v), input_precision=PRECISION)
    return p, p * (d_p - delta[:, None])


def gradient(
    qkv_s: Tensor,
    qkv_t: Tensor,
    saved: Saved,
    up_attention: Tensor,
    up_gram: Tensor,
    ids: Tensor,
    stream: Tensor,
    p: float,
    granularity: str,
) -> Tensor:
    """The gradient of packed qkv_S, contiguous, by the upstream scalars of both terms."""
    batch, n, _, n_heads, _ = qkv_s.shape
    found = torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)
    drawn, granular = draws(ids, stream, p, granularity)
    of_attention, of_gram = factors(qkv_s)
    strides = (*qkv_s.stride()[:4], *qkv_t.stride()[:4], *found.stride()[:4])
    tiling, fixed = fixed_arguments("flash_queries", qkv_s, granular)
    flash_queries_kernel[(blocks(n, tiling.block) + 1, n_heads, batch)](
        *(qkv_s, qkv_t, *saved, up_attention, up_gram, found, *drawn),
        *(of_attention, of_gram, n, *strides),
        **fixed,
    )
    tiling, fixed = fixed_arguments("flash_keys", qkv_s, granular)
    flash_keys_kernel[(blocks(n, tiling.inner), n_heads, batch)](
        *(qkv_s, qkv_t, *saved, up_attention, found, *drawn, of_attention, n, *strides), **fixed
    )
    return found
