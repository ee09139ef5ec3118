"""g() of eq. 3 in one pass: the student's queries, keys and values with the teacher's where the mask says.

One program mixes BLOCK tokens of one head of Q, K or V. The backward is the same with zeros for the teacher's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.tiles import blocks, draws, padded, settings, swap_mask


@triton.jit(do_not_specialize=["digits", "first"])
def swap_mix_kernel(
    student,
    teacher,
    out,
    ids,
    stream,
    digits,
    first,
    n,
    n_heads,
    s_b,
    s_n,
    s_m,
    s_h,
    t_b,
    t_n,
    t_m,
    t_h,
    o_b,
    o_n,
    o_m,
    o_h,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    GRAN: tl.constexpr,
    ZERO: tl.constexpr,
):
    """out = where(mask, teacher or 0, student), packed (B, N, 3, H, d)."""
    sample, matrix, head = tl.program_id(1), tl.program_id(2) // n_heads, tl.program_id(2) % n_heads
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    identity, now, key = tl.load(ids + sample), tl.load(stream + 1), tl.load(stream)
    taken = swap_mask(rows, columns, head, n, matrix, identity, now, key, digits, first, GRAN)
    at = sample.to(tl.int64) * s_b + matrix * s_m + head * s_h
    value = tl.load(student + at + rows[:, None] * s_n + columns[None, :], mask=inside, other=0.0)
    if ZERO:
        other = value * 0
    else:
        at = sample.to(tl.int64) * t_b + matrix * t_m + head * t_h
        other = tl.load(
            teacher + at + rows[:, None] * t_n + columns[None, :], mask=inside, other=0.0
        )
    at = sample.to(tl.int64) * o_b + matrix * o_m + head * o_h
    tl.store(
        out + at + rows[:, None] * o_n + columns[None, :],
        tl.where(taken, other, value),
        mask=inside,
    )


def swap_mix(
    qkv_s: Tensor, qkv_t: Tensor | None, ids: Tensor, stream: Tensor, p: float, granularity: str
) -> Tensor:
    """`reference.swap_mix` on packed qkv (B, N, 3, H, d); without a teacher its values are zeros."""
    batch, n, _, n_heads, width = qkv_s.shape
    other = qkv_s if qkv_t is None else qkv_t
    out = torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)
    tiling, options, _ = settings("swap_mix", qkv_s)
    drawn, granular = draws(ids, stream, p, granularity)
    swap_mix_kernel[(blocks(n, tiling.block), batch, 3 * n_heads)](
        *(qkv_s, other, out, *drawn, n, n_heads),
        *(*qkv_s.stride()[:4], *other.stride()[:4], *out.stride()[:4]),
        WIDTH=width,
        COLUMNS=padded(width),
        BLOCK=tiling.block,
        GRAN=granular,
        ZERO=qkv_t is None,
        **options,
    )
    return out
