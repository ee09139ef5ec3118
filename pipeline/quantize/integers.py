"""What int8 kernels compute of integers: products, means and sums whose rounding no order of float32 sums changes.

A value next to the middle of two levels rounds to the one or the other by the last bit of a float32 sum. Some
hundred thousand values an image make that happen in every image, and a poorly conditioned network multiplies it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.quantize.lsq import Quantizer


@dataclass(frozen=True)
class Grid:
    """The grid of an activation: its scale (), and the level of the value 0."""

    scale: Tensor
    zero_point: int

    def levels(self, x: Tensor) -> Tensor:
        """The integers of x, any shape, which is on this grid, less the zero point."""
        return torch.round(x.detach() / self.scale)


# The grid of an output -> its levels less the zero point, not yet rounded.
Exact = Callable[[Grid], Tensor]


@dataclass(frozen=True)
class Layer:
    """A quantized convolution or product: the grid of its weight; integer_bias: on the int32 grid of the sums."""

    weight: Quantizer
    integer_bias: bool


class _Levels(torch.autograd.Function):
    """x / scale as integers; the gradient is that of the division, and none of the scale."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return torch.div(x, scale).round_()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient / scale, None


def product(
    call: Callable[[Tensor, Tensor, Tensor | None], Tensor],
    operands: tuple[Tensor, Tensor, Tensor | None],
    layer: Layer,
    grid: Grid,
) -> tuple[Tensor, Exact | None]:
    """The output of `call(x, weight, bias)`, with the gradients of it, and exactly; x is on `grid`.

    float32 holds integers below 2^24: the sum is the same in every order, in float64 and in TF32.
    """
    x, weight, bias = operands
    rows = layer.weight.scale.detach()
    unit = grid.scale * rows  # (C,), a level of the sums
    along = (-1, *[1] * (weight.ndim - 2))  # of the channels of the output
    levels = _Levels.apply(layer.weight(weight), rows.view(-1, *[1] * (weight.ndim - 1)))
    own = None
    if bias is not None and layer.integer_bias:
        # They have five digits and more: ONNX Runtime's quantizer divides them in float64.
        own = _Levels.apply(bias.double(), unit.double()).to(bias.dtype)
    sums = call(_Levels.apply(x, grid.scale), levels, own)
    output = sums * unit.view(along)
    if bias is not None and own is None:
        return output + bias.view(along), None
    of_sums = sums.detach()
    return output, lambda grid: of_sums * (unit / grid.scale).view(along)


def mean(levels: Tensor, own: Grid) -> Exact:
    """The mean of a tensor on the grid `own`, from the mean of its levels. Ties are common, and go to even."""
    return lambda grid: levels * (own.scale / grid.scale)


def add(operands: Sequence[Tensor], own: Sequence[Grid]) -> Exact:
    """The sum of two tensors on the grids `own`, by fused multiply-adds of unsigned levels, as on x86."""
    a, b = (
        (grid.levels(x) + grid.zero_point).double() for grid, x in zip(own, operands, strict=True)
    )

    def exact(grid: Grid) -> Tensor:
        ratio_a, ratio_b = (each.scale / grid.scale for each in own)
        zero_a, zero_b = (each.zero_point for each in own)
        zeros = _multiply_add(torch.tensor(float(zero_a)), ratio_a, ratio_b * zero_b)
        total = _multiply_add(b, ratio_b, grid.zero_point - zeros)
        return torch.round(_multiply_add(a, ratio_a, total)) - grid.zero_point

    return exact


def _multiply_add(x: Tensor, factor: Tensor, summand: Tensor) -> Tensor:
    """x * factor + summand, rounded once; x holds integers, so the product is exact in float64."""
    return (x.double() * factor.double() + summand.double()).to(factor.dtype)
