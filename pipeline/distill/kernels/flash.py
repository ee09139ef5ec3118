"""L_proj1 of eq. 4 for any N with no N x N tensor in memory: the losses, in one launch.

The softmaxes of student and teacher run side by side, a block of queries a program, with g() on the fly; what
`flash_gradient` needs stays in memory: 2 E, the student's log-sum-exp and delta = rowsum(2 E * O_S). One program
more for each head takes its Gram term (`gram.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.configs import Config
from pipeline.distill.kernels.gram import gram_of, gram_products
from pipeline.distill.kernels.tiles import (
    arrivals,
    blocks,
    draws,
    finish_sums,
    mixed_tile,
    padded,
    settings,
)

LOG2_E = tl.constexpr(1.4426950408889634)  # a GPU's exponential has base 2


@triton.jit(do_not_specialize=["digits", "first"])
def flash_losses_kernel(
    student,
    teacher,
    doubled,
    log_sums,
    deltas,
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
    KEYS: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Packed qkv of both -> the two losses, 2 E (B, H, N, d), log_sums to the base 2 and deltas (B, H, N)."""
    block, head, slot = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    student += slot * s_b + head * s_h
    teacher += slot * t_b + head * t_h
    of_head = slot * tl.num_programs(1) + head
    index = of_head * tl.num_programs(0) + block
    programs = tl.num_programs(0) * tl.num_programs(1) * tl.num_programs(2)
    if block == tl.num_programs(0) - 1:
        rr, mm, mr = gram_products(
            *(student + 2 * s_m, teacher + 2 * t_m, n, s_n, t_n),
            *(WIDTH, COLUMNS, KEYS, PRECISION),
        )
        tl.store(partial + index, 0.0)
        tl.store(partial + programs + index, gram_of(rr, mm, mr) * of_gram)
    else:
        drawn = (head, n, tl.load(ids + slot), tl.load(stream + 1), tl.load(stream), digits, first)
        rows, columns = block * BLOCK + tl.arange(0, BLOCK), tl.arange(0, COLUMNS)
        inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        out_s, out_t, log_sum = _attentions(
            *(student, teacher, s_n, s_m, t_n, t_m, rows, columns, inside, drawn),
            *(SCALE, WIDTH, COLUMNS, BLOCK, KEYS, GRAN, PRECISION),
        )
        e = tl.where(inside, out_s - out_t, 0.0)
        tl.store(partial + index, tl.sum(e * e) * of_attention)
        tl.store(partial + programs + index, 0.0)
        at = of_head * n * WIDTH + rows[:, None] * WIDTH + columns[None, :]
        tl.store(doubled + at, (2 * e).to(doubled.dtype.element_ty), mask=inside)
        tl.store(log_sums + of_head * n + rows, log_sum, mask=rows < n)
        tl.store(deltas + of_head * n + rows, tl.sum(2 * e * out_s, axis=1), mask=rows < n)
    finish_sums(partial, loss, loss_gram, arrived, programs, 2)


@triton.jit
def _attentions(
    student,
    teacher,
    s_n,
    s_m,
    t_n,
    t_m,
    rows,
    columns,
    inside,
    drawn,
    SCALE: tl.constexpr,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    GRAN: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """O_S and O_T (BLOCK, COLUMNS) of these queries, and the student's log-sum-exp (BLOCK,) to the base 2."""
    head, n, identity, now, key, digits, first = drawn
    q, q_t, _ = mixed_tile(
        *(student, teacher, s_n, t_n, rows, columns, inside),
        *(head, n, 0, identity, now, key, digits, first, GRAN),
    )
    low = tl.full((BLOCK,), float("-inf"), tl.float32)
    top_s, sum_s = low, tl.zeros((BLOCK,), tl.float32)
    out_s = tl.zeros((BLOCK, COLUMNS), tl.float32)
    top_t, sum_t, out_t = top_s, sum_s, out_s
    for start in range(0, n, KEYS):
        others = start + tl.arange(0, KEYS)
        real = others < n
        here = real[:, None] & (columns < WIDTH)[None, :]
        keys = mixed_tile(
            *(student + s_m, teacher + t_m, s_n, t_n, others, columns, here),
            *(head, n, 1, identity, now, key, digits, first, GRAN),
        )
        values = mixed_tile(
            *(student + 2 * s_m, teacher + 2 * t_m, s_n, t_n, others, columns, here),
            *(head, n, 2, identity, now, key, digits, first, GRAN),
        )
        top_s, sum_s, out_s = _add_keys(
            q, keys[0], values[0], real, top_s, sum_s, out_s, SCALE, PRECISION
        )
        top_t, sum_t, out_t = _add_keys(
            q_t, keys[1], values[1], real, top_t, sum_t, out_t, SCALE, PRECISION
        )
    return out_s / sum_s[:, None], out_t / sum_t[:, None], top_s + tl.log2(sum_s)


@triton.jit
def _add_keys(q, k, v, real, top, total, out, SCALE: tl.constexpr, PRECISION: tl.constexpr):
    """One step of the online softmax: running maximum, sum and weighted values with these keys taken in."""
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * (SCALE * LOG2_E)
    scores = tl.where(real[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, axis=1))
    weights = tl.exp2(scores - higher[:, None])
    shrink = tl.exp2(top - higher)
    out = tl.dot(weights.to(v.dtype), v, out * shrink[:, None], input_precision=PRECISION)
    return higher, total * shrink + tl.sum(weights, axis=1), out


Saved = tuple[Tensor, Tensor, Tensor]  # 2 E (B, H, N, d); log-sum-exp and delta (B, H, N) float32


def losses(
    qkv_s: Tensor, qkv_t: Tensor, ids: Tensor, stream: Tensor, p: float, granularity: str
) -> tuple[tuple[Tensor, Tensor], Saved]:
    """Both terms of `reference.pca_loss`, float32 scalars, and what `gradient` reads. Any N, d <= 64."""
    batch, n, _, n_heads, width = qkv_s.shape
    device = qkv_s.device
    drawn, granular = draws(ids, stream, p, granularity)
    tiling, fixed = fixed_arguments("flash_losses", qkv_s, granular)
    programs = blocks(n, tiling.block) + 1
    doubled = torch.empty(batch, n_heads, n, width, dtype=qkv_s.dtype, device=device)
    log_sums, deltas = (torch.empty(batch, n_heads, n, device=device) for _ in range(2))
    partial = torch.empty(2, batch * n_heads * programs, device=device)
    attention, gram = (torch.empty((), device=device) for _ in range(2))
    flash_losses_kernel[(programs, n_heads, batch)](
        *(qkv_s, qkv_t, doubled, log_sums, deltas, partial, attention, gram, arrivals(device)),
        *(*drawn, *factors(qkv_s), n, *qkv_s.stride()[:4], *qkv_t.stride()[:4]),
        **fixed,
    )
    return (attention, gram), (doubled, log_sums, deltas)


def factors(qkv: Tensor) -> tuple[float, float]:
    """1 / (B H N d) of the attention term and 1 / (B H N^2 d) of the Gram term."""
    batch, n, _, n_heads, width = qkv.shape
    return 1 / (batch * n_heads * n * width), 1 / (batch * n_heads * n * n * width)


def fixed_arguments(kernel: str, qkv: Tensor, granular: int) -> tuple[Config, dict[str, Any]]:
    """The configuration of a kernel, and its constants and launch options."""
    width = qkv.shape[-1]
    tiling, options, precision = settings(kernel, qkv)
    fixed = {
        "SCALE": width**-0.5,
        "WIDTH": width,
        "COLUMNS": padded(width),
        "BLOCK": tiling.block,
        "KEYS": tiling.inner,
        "GRAN": granular,
        "PRECISION": precision,
    }
    return tiling, fixed | options
