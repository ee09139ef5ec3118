"""Functions that the Triton kernels share: swap masks, bit by bit those of `philox.bernoulli`, and sums of losses.

Every kernel addresses packed qkv (B, N, 3, H, d) by strides, with unit stride in d. Nothing here needs a driver.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.configs import Config, config
from pipeline.distill.kernels.philox import PLANES as DIGITS

GRANULARITIES = {"element": 0, "token": 1, "matrix": 2, "none": 3}
PLANES = tl.constexpr(DIGITS)
CERTAIN = tl.constexpr(1 << DIGITS)  # the digits of a probability of 1
IN_FLIGHT = 256  # launches that may run at once on one device, each with a counter of its own
AT_ONCE = tl.constexpr(1024)  # partial sums that the last program adds at once


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
    """The table's entry for this device and dtype, its launch options, and how float32 is multiplied: exactly."""
    return _settings(kernel, tensor.device, tensor.shape[-1], tensor.element_size())


@lru_cache(maxsize=256)
def _settings(
    kernel: str, device: torch.device, width: int, element_size: int
) -> tuple[Config, dict[str, int], str]:
    architecture = 0
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        architecture = 10 * major + minor
    tiling = config(kernel, architecture, width).of(element_size)
    return tiling, {"num_warps": tiling.warps, "num_stages": tiling.stages}, "ieee"


def blocks(count: int, size: int) -> int:
    """Blocks of `size` that hold `count`. `triton.cdiv` takes ten microseconds on the host."""
    return -(-count // size)


def padded(width: int) -> int:
    """Columns of a tile: a power of two, 16 at least, as a product of tiles needs."""
    return max(16, 1 << (width - 1).bit_length())


def arrivals(device: torch.device) -> Tensor:
    """A counter (int32, 0) for `finish_sums`, another one each time.

    Made at the first call: under CUDA graphs that must be before the capture.
    """
    return next(_counters(device))


@lru_cache(maxsize=8)
def _counters(device: torch.device) -> Iterator[Tensor]:
    # 16 bytes apart: Triton compiles a kernel once more for a pointer that is not aligned.
    return cycle(torch.zeros(IN_FLIGHT, 4, dtype=torch.int32, device=device).unbind())


@triton.jit
def finish_sums(partial, total, total_2, arrived, programs, SUMS: tl.constexpr):
    """The program that arrives last adds partial (SUMS, programs), in one order: into total, and total_2 if two.

    So there is no second launch, and the bits are the same each time. The counter is 0 again for the next launch.
    """
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == programs - 1:
        _sum_up(partial, total, programs)
        if SUMS == 2:
            _sum_up(partial + programs, total_2, programs)
        tl.store(arrived, 0)


@triton.jit
def _sum_up(partial, total, programs):
    found = tl.zeros((AT_ONCE,), tl.float32)
    for start in range(0, programs, AT_ONCE):
        at = start + tl.arange(0, AT_ONCE)
        # Past the first-level cache: other multiprocessors have written them.
        found += tl.load(partial + at, mask=at < programs, other=0.0, cache_modifier=".cg")
    tl.store(total, tl.sum(found))


@triton.jit
def swap_mask(
    rows, columns, head, n, tensor, sample, step, seed, digits, first, GRAN: tl.constexpr, chunk=0
):
    """(rows, columns) bool: where g() takes the teacher's value. rows are tokens, columns 0..d-1 of one head.

    digits / 2^8 is the probability, first its lowest set binary digit (`philox.bernoulli`); chunk counts the 128
    columns before these. `sample` is one of all rows or of each.
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
    every = tl.where(digits == CERTAIN, -1, 0).to(tl.uint32)
    if GRAN == 0:
        part = (columns // 32)[None, :]
        word = tl.where(part == 0, (w0 | every)[:, None], (w1 | every)[:, None])
        if columns.shape[0] > 64:
            word = tl.where(part == 2, (w2 | every)[:, None], word)
            word = tl.where(part == 3, (w3 | every)[:, None], word)
        bit = (columns % 32).to(tl.uint32)[None, :]
    else:
        word, bit = (w0 | every)[:, None], (columns * 0).to(tl.uint32)[None, :]
    return ((word >> bit) & 1) != 0


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


@triton.jit
def through_mask(
    gradient,
    rows,
    columns,
    head,
    n,
    tensor,
    identity,
    stream,
    digits,
    first,
    GRAN: tl.constexpr,
):
    """The gradient of one matrix of one head behind g(): 0 where the teacher's was taken.

    The mask is drawn again, by a key read again: kept since the forward part, the masks of Q, K and V would take
    96 registers of each thread.
    """
    sample = tl.load(identity, volatile=True)
    step, seed = tl.load(stream + 1, volatile=True), tl.load(stream, volatile=True)
    taken = swap_mask(rows, columns, head, n, tensor, sample, step, seed, digits, first, GRAN)
    return tl.where(taken, 0.0, gradient)
