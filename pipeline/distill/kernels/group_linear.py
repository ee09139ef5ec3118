"""L_proj2 of eq. 5 and 6 in two launches: the loss with its projection, then all gradients.

The rows of a group are its tokens in every sample. A program reads a tile of them where they lie, so that
nothing is permuted in memory, and writes each result to its token. The first launch subtracts the target from
the float32 product before anything is rounded: the residual keeps its digits when the student is near. The
second has programs of two kinds, for the weights and for the tokens, so that the few long ones of the weights
never run alone. It scales the residual by the upstream scalar, adds what the projection's other readers send
back, and takes the gradient of the tokens through the dropout that `dropout.py` drew before the product.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.configs import WIDEST_HEAD
from pipeline.distill.kernels.eager import constant
from pipeline.distill.kernels.philox import rounded
from pipeline.distill.kernels.reference import DROPOUT_TENSOR
from pipeline.distill.kernels.tiles import arrivals, blocks, draws, finish_sums, settings, swap_mask

DRAW = tl.constexpr(DROPOUT_TENSOR)
CHUNK = tl.constexpr(WIDEST_HEAD)


@triton.jit
def project_kernel(
    tokens,
    weight,
    bias,
    target,
    out,
    residual,
    partial,
    loss,
    arrived,
    order,
    tiles,
    scale,
    n,
    channels,
    width,
    x_b,
    x_n,
    t_b,
    t_n,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    TARGET: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """tokens (B, N, c), weight (G, D, c), bias (G, D) -> out, residual (B, N, D), the loss."""
    group, sample, token, real = _rows(order, tiles, tl.program_id(1), BLOCK)
    columns, depths = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    x_at = tokens + (sample * x_b + token * x_n)[:, None]
    w_at = weight + (group * width + columns).to(tl.int64)[None, :] * channels
    product = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, channels, DEPTH):
        depth = start + depths
        x = tl.load(
            x_at + depth[None, :], mask=real[:, None] & (depth < channels)[None, :], other=0.0
        )
        there = (depth < channels)[:, None] & (columns < width)[None, :]
        w = tl.load(w_at + depth[:, None], mask=there, other=0.0)
        product = tl.dot(x, w, product, input_precision=PRECISION)
    plus = tl.load(bias + group * width + columns, mask=columns < width, other=0.0)
    product += plus.to(tl.float32)[None, :]
    inside = real[:, None] & (columns < width)[None, :]
    at = ((sample * n + token) * width)[:, None] + columns[None, :]
    tl.store(out + at, product.to(out.dtype.element_ty), mask=inside)
    if TARGET:
        theirs = tl.load(
            target + (sample * t_b + token * t_n)[:, None] + columns[None, :],
            mask=inside,
            other=0.0,
        )
        e = tl.where(inside, product - theirs.to(tl.float32), 0.0)
        tl.store(residual + at, e.to(residual.dtype.element_ty), mask=inside)
        index = tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(partial + index, tl.sum(e * e) * scale)
        finish_sums(partial, loss, loss, arrived, tl.num_programs(0) * tl.num_programs(1), 1)
    else:
        tl.store(loss, 0.0)


@triton.jit(do_not_specialize=["digits", "first", "of_weights"])
def gradients_kernel(
    tokens,
    weight,
    residual,
    up_loss,
    up_out,
    d_tokens,
    d_weight,
    d_bias,
    order,
    tiles,
    groups,
    ids,
    stream,
    digits,
    first,
    kept,
    scale,
    of_weights,
    batch,
    n,
    channels,
    width,
    x_b,
    x_n,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOSS: tl.constexpr,
    OUT: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dY = scale up_loss residual + up_out -> dX = dY W through the dropout, dW = dY^T X, db = sum dY.

    The first `of_weights` programs take a tile of the weights each, the others one of the tokens.
    """
    factor = 1.0
    if LOSS:
        factor = tl.load(up_loss).to(tl.float32) * scale
    program = tl.program_id(0)
    across = tl.cdiv(channels, COLUMNS)
    if program < of_weights:
        _of_weights(
            *(tokens, residual, up_out, factor, d_weight, d_bias, order, groups, program, across),
            *(batch, n, channels, width, x_b, x_n, BLOCK, COLUMNS, DEPTH, LOSS, OUT, PRECISION),
        )
    else:
        _of_tokens(
            *(weight, residual, up_out, factor, d_tokens, order, tiles, program - of_weights),
            *(across, ids, stream, digits, first, kept, n, channels, width),
            *(BLOCK, COLUMNS, DEPTH, LOSS, OUT, DROP, PRECISION),
        )


@triton.jit
def _of_tokens(
    weight,
    residual,
    up_out,
    factor,
    d_tokens,
    order,
    tiles,
    program,
    across,
    ids,
    stream,
    digits,
    first,
    kept,
    n,
    channels,
    width,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOSS: tl.constexpr,
    OUT: tl.constexpr,
    DROP: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dY W of one tile of tokens, by the weights of their group, through the dropout."""
    group, sample, token, real = _rows(order, tiles, program // across, BLOCK)
    begin, depths = program % across * COLUMNS, tl.arange(0, DEPTH)
    columns = begin + tl.arange(0, COLUMNS)
    row = (sample * n + token)[:, None]
    product = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + depths
        here = real[:, None] & (depth < width)[None, :]
        d_y = _upstream(residual, up_out, row * width + depth[None, :], here, factor, LOSS, OUT)
        there = (depth < width)[:, None] & (columns < channels)[None, :]
        w_at = (group * width + depth).to(tl.int64)[:, None] * channels + columns[None, :]
        w = tl.load(weight + w_at, mask=there, other=0.0)
        product = tl.dot(d_y, w, product, input_precision=PRECISION)
    if not OUT:
        product *= factor
    if DROP:
        identity = tl.load(ids + sample, mask=real, other=0)
        now, key = tl.load(stream + 1), tl.load(stream)
        keep = swap_mask(
            *(token, begin % CHUNK + tl.arange(0, COLUMNS), 0, n, DRAW, identity, now, key),
            *(digits, first, 0, begin // CHUNK),
        )
        product = tl.where(keep, product * kept, 0.0)
    inside = real[:, None] & (columns < channels)[None, :]
    at = row * channels + columns[None, :]
    tl.store(d_tokens + at, product.to(d_tokens.dtype.element_ty), mask=inside)


@triton.jit
def _of_weights(
    tokens,
    residual,
    up_out,
    factor,
    d_weight,
    d_bias,
    order,
    groups,
    program,
    across,
    batch,
    n,
    channels,
    width,
    x_b,
    x_n,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LOSS: tl.constexpr,
    OUT: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dY^T X of one tile of a group's weights and the sum of dY, over all rows of the group: no atomics."""
    columns = program % across * COLUMNS + tl.arange(0, COLUMNS)
    down = tl.cdiv(width, BLOCK)
    group = program // across // down
    outs = program // across % down * BLOCK + tl.arange(0, BLOCK)
    offset, size = tl.load(groups + 2 * group), tl.load(groups + 2 * group + 1)
    product = tl.zeros((BLOCK, COLUMNS), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch * size, DEPTH):
        row = start + tl.arange(0, DEPTH)
        real = row < batch * size
        sample = (row // size).to(tl.int64)
        token = tl.load(order + offset + row % size, mask=real, other=0)
        at = ((sample * n + token) * width)[None, :] + outs[:, None]
        here = real[None, :] & (outs < width)[:, None]
        d_y = _upstream(residual, up_out, at, here, factor, LOSS, OUT)
        x = tl.load(
            tokens + (sample * x_b + token * x_n)[:, None] + columns[None, :],
            mask=real[:, None] & (columns < channels)[None, :],
            other=0.0,
        )
        product = tl.dot(d_y, x, product, input_precision=PRECISION)
        total += tl.sum(d_y.to(tl.float32), axis=1)
    if not OUT:
        product, total = product * factor, total * factor
    out = (group * width + outs).to(tl.int64)
    inside = (outs < width)[:, None] & (columns < channels)[None, :]
    at = out[:, None] * channels + columns[None, :]
    tl.store(d_weight + at, product.to(d_weight.dtype.element_ty), mask=inside)
    alone = (outs < width) & (program % across == 0)
    tl.store(d_bias + out, total.to(d_bias.dtype.element_ty), mask=alone)


@triton.jit
def _upstream(residual, up_out, at, mask, factor, LOSS: tl.constexpr, OUT: tl.constexpr):
    """A tile of dY in the operand's dtype; of the residual alone it is unscaled, which keeps its digits."""
    if OUT:
        d_y = tl.load(up_out + at, mask=mask, other=0.0)
        if LOSS:
            e = tl.load(residual + at, mask=mask, other=0.0)
            d_y = (e.to(tl.float32) * factor + d_y.to(tl.float32)).to(d_y.dtype)
    else:
        d_y = tl.load(residual + at, mask=mask, other=0.0)
    return d_y


@triton.jit
def _rows(order, tiles, index, BLOCK: tl.constexpr):
    """The group of a tile, and of each of its rows the sample, the token and whether it exists."""
    group, first = tl.load(tiles + 5 * index), tl.load(tiles + 5 * index + 1)
    offset, size = tl.load(tiles + 5 * index + 2), tl.load(tiles + 5 * index + 3)
    rows = first + tl.arange(0, BLOCK)
    real = rows < tl.load(tiles + 5 * index + 4)
    token = tl.load(order + offset + rows % size, mask=real, other=0)
    return group, (rows // size).to(tl.int64), token, real


@lru_cache(maxsize=64)
def _tiles(device: torch.device, sizes: tuple[int, ...], batch: int, block: int) -> Tensor:
    """Every tile of `block` rows (tiles, 5): group, first row in it, first index into `order`, tokens, rows."""
    table, offset = [], 0
    for group, size in enumerate(sizes):
        for first in range(0, batch * size, block):
            table.append((group, first, offset, size, batch * size))
        offset += size
    return torch.tensor(table).to(device)


def project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor | None,
    order: Sequence[int],
    sizes: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """mse(Proj2(x), target), float32; Proj2(x) (B, N, D); their difference. Without a target 0 and empty."""
    batch, n, channels = x.shape
    width = weight.shape[1]
    x, weight = _unit(x), weight.contiguous()
    out = torch.empty(batch, n, width, dtype=x.dtype, device=x.device)
    residual = torch.empty_like(out) if target is not None else out.new_empty(0)
    goal = out if target is None else _unit(target)
    tiling, options, precision = settings("gl_project", x)
    tiles = _tiles(x.device, tuple(sizes), batch, tiling.block)
    grid = (blocks(width, tiling.columns), len(tiles))
    partial = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=x.device)
    loss = torch.empty((), dtype=torch.float32, device=x.device)
    project_kernel[grid](
        *(x, weight, bias, goal, out, residual, partial, loss, arrivals(x.device)),
        *(constant(x.device, *order), tiles, 1 / out.numel(), n, channels, width),
        *(*x.stride()[:2], *goal.stride()[:2]),
        BLOCK=tiling.block,
        COLUMNS=tiling.columns,
        DEPTH=tiling.inner,
        TARGET=target is not None,
        PRECISION=precision,
        **options,
    )
    return loss, out, residual


def gradients(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    up_loss: Tensor | None,
    up_out: Tensor | None,
    order: Sequence[int],
    sizes: Sequence[int],
    ids: Tensor,
    stream: Tensor,
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """d x (B, N, c) before its dropout `p`, d weight (G, D, c), d bias (G, D).

    x is what the product read, behind the dropout. The upstream gradients are of the loss (scalar) and of the
    projection (B, N, D): one of them at least.
    """
    batch, n, channels = x.shape
    width = weight.shape[1]
    x, weight = _unit(x), weight.contiguous()
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    d_bias = torch.empty(weight.shape[:2], dtype=weight.dtype, device=x.device)
    starts = accumulate(sizes[:-1], initial=0)
    groups = constant(x.device, *(v for pair in zip(starts, sizes, strict=True) for v in pair))
    tiling, options, precision = settings("gl_gradients", x)
    tiles = _tiles(x.device, tuple(sizes), batch, tiling.block)
    across = blocks(channels, tiling.columns)
    of_weights = across * blocks(width, tiling.block) * len(sizes)
    drawn, _ = draws(ids, stream, 1 - p, "element")
    gradients_kernel[(of_weights + across * len(tiles),)](
        *(x, weight, residual, residual if up_loss is None else up_loss),
        *(residual if up_out is None else up_out.contiguous(), d_x, d_weight, d_bias),
        *(constant(x.device, *order), tiles, groups, *drawn, 1 / rounded(1 - p)),
        *(2 / (batch * n * width), of_weights, batch, n, channels, width, *x.stride()[:2]),
        BLOCK=tiling.block,
        COLUMNS=tiling.columns,
        DEPTH=tiling.inner,
        LOSS=up_loss is not None,
        OUT=up_out is not None,
        DROP=p > 0,
        PRECISION=precision,
        **options,
    )
    return d_x, d_weight, d_bias


def _unit(tokens: Tensor) -> Tensor:
    """Tokens (B, N, channels) with the channels side by side, as the kernels read them."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()
