"""Functions that the Triton kernels share: the swap masks of a tile, bit by bit those of `philox.bernoulli`.

Every kernel addresses packed qkv (B, N, 3, H, d) by strides, with unit stride in d. Nothing here needs a driver.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.configs import Config, config
from pipeline.distill.kernels.philox import PLANES as DIGITS

GRANULARITIES = {"element": 0, "token": 1, "matrix": 2, "none": 3}
PLANES = tl.constexpr(DIGITS)
CERTAIN = tl.constexpr(1 << DIGITS)  # the digits of a probability of 1


def draws(
    ids: Tensor, stream: Tensor, p: float, granularity: str
) -> tuple[tuple[Tensor, Tensor, int, int], int]:
    """Arguments of `swap_mask`: (ids, stream, digits, first) and GRAN. `none` is a probability of 0.

    `stream` (2,) int64 holds seed and step: read on the device, so that a step neither waits nor recompiles.
    """
    digits = 0 if granularity == "none" else round(p * (1 << DIGITS))
    certain = digits in (0, 1 << DIGITS)
    first = DIGITS if certain else (digits & -digits).bit_length() - 1
    return (ids, stream, digits, first), min(GRANULARITIES[granularity], 2)


def settings(kernel: str, tensor: Tensor) -> tuple[Config, dict[str, int], str]:
    """The table's entry for this device, its launch options, and how float32 is multiplied: exactly."""
    architecture = 0
    if tensor.is_cuda:
        major, minor = torch.cuda.get_device_capability(tensor.device)
        architecture = 10 * major + minor
    tiling = config(kernel, architecture)
    return tiling, {"num_warps": tiling.warps, "num_stages": tiling.stages}, "ieee"


def padded(width: int) -> int:
    """Columns of a tile: a power of two, 16 at least, as a product of tiles needs."""
    return max(16, 1 << (width - 1).bit_length())


@triton.jit
def swap_mask(
    rows, columns, head, n, tensor, sample, step, seed, digits, first, GRAN: tl.constexpr, chunk=0
):
    """(rows, columns) bool: where g() takes the teacher's value. rows are tokens, columns 0..d-1 of one head.

    digits / 2^8 is the probability, first its lowest set binary digit (`philox.bernoulli`); chunk counts the 128
    columns before these.
    """
    if GRAN == 0:
        counter = (head * n + rows).to(tl.uint32)
    elif GRAN == 1:
        counter = rows.to(tl.uint32)
    else:
        counter = (rows * 0).to(tl.uint32)
    zero = counter * 0
    c2, c3 = zero + sample.to(tl.uint32), zero + step.to(tl.uint32)
    w0, w1, w2, w3 = zero, zero, zero, zero
    for plane in range(first, PLANES):
        c1 = (zero.to(tl.int32) + tensor + 4 * (PLANES * chunk + PLANES - 1 - plane)).to(tl.uint32)
        r0, r1, r2, r3 = tl.philox(seed, counter, c1, c2, c3)
        if (digits >> plane) & 1:
            w0, w1, w2, w3 = w0 | r0, w1 | r1, w2 | r2, w3 | r3
        else:
            w0, w1, w2, w3 = w0 & r0, w1 & r1, w2 & r2, w3 & r3
    if GRAN == 0:
        part = (columns // 32)[None, :]
        word = tl.where(part == 0, w0[:, None], w1[:, None])
        word = tl.where(part == 2, w2[:, None], word)
        word = tl.where(part == 3, w3[:, None], word)
        bit = (columns % 32).to(tl.uint32)[None, :]
    else:
        word, bit = w0[:, None], (columns * 0).to(tl.uint32)[None, :]
    taken = ((word >> bit) & 1) != 0
    return taken | (digits == CERTAIN)


@triton.jit
def mixed_tile(
    student,
    teacher,
    s_n,
    t_n,
    rows,
    columns,
    inside,
    head,
    n,
    tensor,
    sample,
    step,
    seed,
    digits,
    first,
    GRAN: tl.constexpr,
):
    """(rows, columns) of one matrix of one head: g() of it, the teacher's, and where the teacher's was taken."""
    taken = swap_mask(rows, columns, head, n, tensor, sample, step, seed, digits, first, GRAN)
    at = columns[None, :]
    theirs = tl.load(teacher + rows[:, None] * t_n + at, mask=inside, other=0.0)
    ours = tl.load(student + rows[:, None] * s_n + at, mask=inside, other=0.0)
    return tl.where(taken, theirs, ours), theirs, taken
