"""The group-wise linear layer of eq. 5 and the residual of eq. 6: one launch for all groups, forward and backward.

The rows of a group are its tokens in every sample. A program reads a tile of them where they lie, so that nothing
is permuted in memory, and writes each result to its token. The forward subtracts the target from the float32
product before anything is rounded: the residual keeps its digits when the student is near.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from itertools import accumulate

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.eager import constant
from pipeline.distill.kernels.tiles import settings


@triton.jit
def project_kernel(
    tokens,
    weight,
    bias,
    target,
    out,
    residual,
    losses,
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
    """tokens (B, N, c), weight (G, D, c), bias (G, D) -> out, residual (B, N, D), losses to be summed."""
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
        tl.store(losses + index, tl.sum(e * e) * scale)


@triton.jit
def input_kernel(
    upstream,
    weight,
    gradient,
    order,
    tiles,
    n,
    channels,
    width,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """upstream (B, N, D) -> gradient (B, N, c) of the tokens: dY W of each token's group."""
    group, sample, token, real = _rows(order, tiles, tl.program_id(1), BLOCK)
    columns, depths = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS), tl.arange(0, DEPTH)
    row = (sample * n + token)[:, None]
    product = tl.zeros((BLOCK, COLUMNS), tl.float32)
    for start in range(0, width, DEPTH):
        depth = start + depths
        here = real[:, None] & (depth < width)[None, :]
        d_y = tl.load(upstream + row * width + depth[None, :], mask=here, other=0.0)
        there = (depth < width)[:, None] & (columns < channels)[None, :]
        w_at = (group * width + depth).to(tl.int64)[:, None] * channels + columns[None, :]
        w = tl.load(weight + w_at, mask=there, other=0.0)
        product = tl.dot(d_y, w, product, input_precision=PRECISION)
    inside = real[:, None] & (columns < channels)[None, :]
    tl.store(
        gradient + row * channels + columns[None, :],
        product.to(gradient.dtype.element_ty),
        mask=inside,
    )


@triton.jit
def weight_kernel(
    tokens,
    upstream,
    d_weight,
    d_bias,
    order,
    groups,
    batch,
    n,
    channels,
    width,
    x_b,
    x_n,
    BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """dW = dY^T X (G, D, c) and db = sum dY (G, D), over all rows of a group, by one program: no atomics."""
    group = tl.program_id(2)
    first, size = tl.load(groups + 2 * group), tl.load(groups + 2 * group + 1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    outs = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    product = tl.zeros((BLOCK, COLUMNS), tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, batch * size, DEPTH):
        row = start + tl.arange(0, DEPTH)
        real = row < batch * size
        sample = (row // size).to(tl.int64)
        token = tl.load(order + first + row % size, mask=real, other=0)
        d_y = tl.load(
            upstream + ((sample * n + token) * width)[None, :] + outs[:, None],
            mask=real[None, :] & (outs < width)[:, None],
            other=0.0,
        )
        x = tl.load(
            tokens + (sample * x_b + token * x_n)[:, None] + columns[None, :],
            mask=real[:, None] & (columns < channels)[None, :],
            other=0.0,
        )
        product = tl.dot(d_y, x, product, input_precision=PRECISION)
        total += tl.sum(d_y.to(tl.float32), axis=1)
    row = (group * width + outs).to(tl.int64)
    inside = (outs < width)[:, None] & (columns < channels)[None, :]
    at = row[:, None] * channels + columns[None, :]
    tl.store(d_weight + at, product.to(d_weight.dtype.element_ty), mask=inside)
    alone = (outs < width) & (tl.program_id(0) == 0)
    tl.store(d_bias + row, total.to(d_bias.dtype.element_ty), mask=alone)


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
    """mse(Proj2(x), target), float32 scalar; Proj2(x) (B, N, D); their difference, empty without a target."""
    batch, n, channels = x.shape
    width = weight.shape[1]
    x, weight = _unit(x), weight.contiguous()
    goal = None if target is None else _unit(target)
    out = torch.empty(batch, n, width, dtype=x.dtype, device=x.device)
    residual = torch.empty_like(out) if target is not None else out.new_empty(0)
    tiling, options, precision = settings("gl_project", x)
    tiles = _tiles(x.device, tuple(sizes), batch, tiling.block)
    grid = (triton.cdiv(width, tiling.columns), len(tiles))
    losses = torch.empty(grid[0] * grid[1], dtype=torch.float32, device=x.device)
    project_kernel[grid](
        *(x, weight, bias, out if goal is None else goal, out, residual, losses),
        *(constant(x.device, *order), tiles, 1 / out.numel(), n, channels, width),
        *(*x.stride()[:2], *(out if goal is None else goal).stride()[:2]),
        BLOCK=tiling.block,
        COLUMNS=tiling.columns,
        DEPTH=tiling.inner,
        TARGET=target is not None,
        PRECISION=precision,
        **options,
    )
    return losses.sum() if target is not None else losses.new_zeros(()), out, residual


def gradients(
    x: Tensor, weight: Tensor, upstream: Tensor, order: Sequence[int], sizes: Sequence[int]
) -> tuple[Tensor, Tensor, Tensor]:
    """Of upstream (B, N, D): d x (B, N, c), d weight (G, D, c), d bias (G, D)."""
    batch, n, channels = x.shape
    width = weight.shape[1]
    x, weight, upstream = _unit(x), weight.contiguous(), upstream.contiguous()
    indices = constant(x.device, *order)
    d_x = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    tiling, options, precision = settings("gl_input", x)
    tiles = _tiles(x.device, tuple(sizes), batch, tiling.block)
    input_kernel[(triton.cdiv(channels, tiling.columns), len(tiles))](
        *(upstream, weight, d_x, indices, tiles, n, channels, width),
        BLOCK=tiling.block,
        COLUMNS=tiling.columns,
        DEPTH=tiling.inner,
        PRECISION=precision,
        **options,
    )
    d_weight = torch.empty(weight.shape, dtype=weight.dtype, device=x.device)
    d_bias = torch.empty(weight.shape[:2], dtype=weight.dtype, device=x.device)
    starts = accumulate(sizes[:-1], initial=0)
    groups = constant(x.device, *(v for pair in zip(starts, sizes, strict=True) for v in pair))
    tiling, options, _ = settings("gl_weight", x)
    grid = (triton.cdiv(channels, tiling.columns), triton.cdiv(width, tiling.block), len(sizes))
    weight_kernel[grid](
        *(
            x,
            upstream,
            d_weight,
            d_bias,
            indices,
            groups,
            batch,
            n,
            channels,
            width,
            *x.stride()[:2],
        ),
        BLOCK=tiling.block,
        COLUMNS=tiling.columns,
        DEPTH=tiling.inner,
        PRECISION=precision,
        **options,
    )
    return d_x, d_weight, d_bias


def _unit(tokens: Tensor) -> Tensor:
    """Tokens (B, N, channels) with the channels side by side, as the kernels read them."""
    return tokens if tokens.stride(2) == 1 else tokens.contiguous()
