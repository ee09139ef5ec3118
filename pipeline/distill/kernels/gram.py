"""The Gram term of eq. 4 and its gradient in one launch, without any N x N matrix and without cancellation.

With R = V_T - V_S and M = (V_T + V_S) / 2 the difference of the two Gram matrices is R M^T + M R^T. So the loss is
2 (<R^T R, M^T M> + <G, G^T>), G = M^T R, and dL/dV_S = -4 [R (M^T M - G / 2) + M (G^T - R^T R / 2)]: three d x d
matrices, every one of the order of R. One program takes one head of one sample; it reads V twice.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from pipeline.distill.kernels.tiles import arrivals, finish_sums, padded, settings


@triton.jit
def gram_kernel(
    student,
    teacher,
    gradient,
    partial,
    loss,
    arrived,
    of_gram,
    n,
    s_b,
    s_n,
    s_h,
    t_b,
    t_n,
    t_h,
    g_b,
    g_n,
    g_h,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """V (B, N, H, d) of both -> the loss, scalar, and B H N d times d loss / d V_S."""
    head, sample = tl.program_id(0), tl.program_id(1).to(tl.int64)
    student += sample * s_b + head * s_h
    teacher += sample * t_b + head * t_h
    gradient += sample * g_b + head * g_h
    rr, mm, mr = gram_products(student, teacher, n, s_n, t_n, WIDTH, COLUMNS, BLOCK, PRECISION)
    programs = tl.num_programs(0) * tl.num_programs(1)
    index = tl.program_id(1) * tl.num_programs(0) + head
    tl.store(partial + index, gram_of(rr, mm, mr) * of_gram)
    gram_gradient(
        *(student, teacher, gradient, rr, mm, mr, -4.0 / n, n, s_n, t_n, g_n),
        *(WIDTH, COLUMNS, BLOCK, PRECISION),
    )
    finish_sums(partial, loss, loss, arrived, programs, 1)


@triton.jit
def gram_products(
    student,
    teacher,
    n,
    s_n,
    t_n,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """R^T R, M^T M and M^T R (COLUMNS, COLUMNS) float32 of the V of one head."""
    columns = tl.arange(0, COLUMNS)
    rr = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    mm = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    mr = tl.zeros((COLUMNS, COLUMNS), tl.float32)
    for start in range(0, n, BLOCK):
        r, m = _difference_and_mean(student, teacher, start, n, s_n, t_n, columns, WIDTH, BLOCK)
        rr = tl.dot(tl.trans(r), r, rr, input_precision=PRECISION)
        mm = tl.dot(tl.trans(m), m, mm, input_precision=PRECISION)
        mr = tl.dot(tl.trans(m), r, mr, input_precision=PRECISION)
    return rr, mm, mr


@triton.jit
def gram_of(rr, mm, mr):
    """The squared distance of the two Gram matrices of one head."""
    return 2 * (tl.sum(rr * mm) + tl.sum(mr * tl.trans(mr)))


@triton.jit
def gram_gradient(
    student,
    teacher,
    gradient,
    rr,
    mm,
    mr,
    factor,
    n,
    s_n,
    t_n,
    g_n,
    WIDTH: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """Write `factor` times R (M^T M - G / 2) + M (G^T - R^T R / 2) of one head."""
    columns = tl.arange(0, COLUMNS)
    kind = student.dtype.element_ty
    # Over N before the cast, as a mean is: a sum over the tokens would leave the range of float16.
    first = ((mm - mr / 2) / n).to(kind)
    second = ((tl.trans(mr) - rr / 2) / n).to(kind)
    for start in range(0, n, BLOCK):
        r, m = _difference_and_mean(student, teacher, start, n, s_n, t_n, columns, WIDTH, BLOCK)
        value = tl.dot(r, first, input_precision=PRECISION)
        value = tl.dot(m, second, value, input_precision=PRECISION) * (factor * n)
        rows = start + tl.arange(0, BLOCK)
        inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
        tl.store(gradient + rows[:, None] * g_n + columns[None, :], value.to(kind), mask=inside)


@triton.jit
def _difference_and_mean(
    student, teacher, start, n, s_n, t_n, columns, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    """R and M (BLOCK, COLUMNS) of the tokens from `start`, computed in float32, in the dtype of V."""
    rows = start + tl.arange(0, BLOCK)
    inside = (rows < n)[:, None] & (columns < WIDTH)[None, :]
    s = tl.load(student + rows[:, None] * s_n + columns[None, :], mask=inside, other=0.0)
    t = tl.load(teacher + rows[:, None] * t_n + columns[None, :], mask=inside, other=0.0)
    a, b = s.to(tl.float32), t.to(tl.float32)
    return (b - a).to(s.dtype), ((a + b) / 2).to(s.dtype)


def gram(v_s: Tensor, v_t: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.gram_loss` of V (B, N, H, d): the loss, float32 scalar, and its gradient times B H N d."""
    batch, n, n_heads, width = v_s.shape
    gradient = torch.empty(v_s.shape, dtype=v_s.dtype, device=v_s.device)
    partial = torch.empty(batch * n_heads, device=v_s.device)
    loss = torch.empty((), device=v_s.device)
    tiling, options, precision = settings("gram", v_s)
    gram_kernel[(n_heads, batch)](
        *(v_s, v_t, gradient, partial, loss, arrivals(v_s.device)),
        *(1 / (batch * n_heads * n * n * width), n),
        *(*v_s.stride()[:3], *v_t.stride()[:3], *gradient.stride()[:3]),
        WIDTH=width,
        COLUMNS=padded(width),
        BLOCK=tiling.block,
        PRECISION=precision,
        **options,
    )
    return loss, gradient
