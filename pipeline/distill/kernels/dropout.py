"""Dropout of tokens in one pass with the mask of `reference.dropout`, bit by bit, which is never stored.

The backward is the same kernel on the upstream gradient.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.configs import WIDEST_HEAD
from pipeline.distill.kernels.philox import rounded
from pipeline.distill.kernels.reference import DROPOUT_TENSOR
from pipeline.distill.kernels.tiles import blocks, draws, settings, swap_mask

DRAW = tl.constexpr(DROPOUT_TENSOR)
COLUMNS = tl.constexpr(WIDEST_HEAD)


@triton.jit(do_not_specialize=["digits", "first"])
def dropout_kernel(
    tokens,
    out,
    ids,
    stream,
    digits,
    first,
    scale,
    n,
    channels,
    s_b,
    s_n,
    o_b,
    o_n,
    BLOCK: tl.constexpr,
):
    """out = where(mask, tokens * scale, 0) of BLOCK tokens (B, N, c) and 128 channels."""
    sample, chunk = tl.program_id(2), tl.program_id(1)
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    columns = tl.arange(0, COLUMNS)
    at = chunk * COLUMNS + columns[None, :]
    inside = (rows < n)[:, None] & (at < channels)
    identity, now, key = tl.load(ids + sample), tl.load(stream + 1), tl.load(stream)
    keep = swap_mask(rows, columns, 0, n, DRAW, identity, now, key, digits, first, 0, chunk)
    wide = sample.to(tl.int64)
    value = tl.load(tokens + wide * s_b + rows[:, None] * s_n + at, mask=inside, other=0.0)
    value = tl.where(keep, value.to(tl.float32) * scale, 0.0).to(out.dtype.element_ty)
    tl.store(out + wide * o_b + rows[:, None] * o_n + at, value, mask=inside)


def dropout(x: Tensor, ids: Tensor, stream: Tensor, p: float) -> Tensor:
    """`reference.dropout` of x (B, N, c), 0 < p < 1: a new contiguous tensor."""
    batch, n, channels = x.shape
    x = x if x.stride(2) == 1 else x.contiguous()
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiling, options, _ = settings("dropout", x)
    drawn, _ = draws(ids, stream, 1 - p, "element")
    dropout_kernel[(blocks(n, tiling.block), blocks(channels, WIDEST_HEAD), batch)](
        *(x, out, *drawn, 1 / rounded(1 - p), n, channels),
        *(*x.stride()[:2], *out.stride()[:2]),
        BLOCK=tiling.block,
        **options,
    )
    return out
