"""Learned step size quantization (LSQ; Esser et al., ICLR 2020): rounding to a grid whose scale is trained."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn


class _Round(torch.autograd.Function):
    """x -> scale * clamp(round(x / scale), low, high), with the gradients of eq. 3 and of the straight-through x.

    PyTorch's `_fake_quantize_learnable_per_tensor_affine` computes the same; on a CPU it took 6 times as long.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, low: int, high: int, exact: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(x, scale)
        ctx.levels = (low, high)
        if exact is None:
            return _rounded(x, scale, low, high)
        return torch.round(exact).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Eq. 3: d/ds is round(x/s) - x/s inside the range, its end outside: (y - x inside) / s in both cases."""
        x, scale = ctx.saved_tensors
        low, high = ctx.levels
        y = _rounded(x, scale, low, high)
        if scale.numel() == 1:
            step = float(scale)
            to_x = torch.ops.aten.hardtanh_backward(gradient, x, low * step, high * step)
            to_scale = torch.dot(gradient.flatten(), y.flatten())
            to_scale -= torch.dot(to_x.flatten(), x.flatten())
        else:
            to_x = gradient * ((x > low * scale) & (x < high * scale))
            along = [axis for axis in range(x.ndim) if scale.shape[axis] == 1]
            to_scale = (gradient * y - to_x * x).sum(dim=along)
        return to_x, to_scale.view_as(scale) / scale, None, None, None


def _rounded(x: Tensor, scale: Tensor, low: int, high: int) -> Tensor:
    return torch.div(x, scale).round_().clamp_(low, high).mul_(scale)


class Quantizer(nn.Module):
    """A grid with trained scales: () or one per channel along `axis`; levels low to high, 0 among them.

    What is trained is ln(scale): an optimiser's step is then relative, and a scale stays positive. `ceiling`: the
    largest value that a range may reach, where the exported network has a clip below it that int8 takes over.
    """

    def __init__(
        self,
        scales: Tensor,
        low: int,
        high: int,
        axis: int | None = None,
        ceiling: float | None = None,
    ) -> None:
        super().__init__()
        self.low, self.high, self.axis = low, high, axis
        self.limit = math.log(ceiling / high) if ceiling is not None else math.inf
        self.log_scale = nn.Parameter(scales.log())

    @property
    def scale(self) -> Tensor:
        """The scales, as the exported network gets them."""
        return self.log_scale.clamp(max=self.limit).exp()

    def forward(self, x: Tensor, exact: Tensor | None = None) -> Tensor:
        """Round x, any shape, to the grid. exact: x / scale from integers, to be rounded instead; no gradient."""
        count = x.numel() if self.axis is None else x.numel() // x.shape[self.axis]
        scale = _Scaled.apply(self.scale, 1 / math.sqrt(count * self.high))  # g of section 2.2
        if self.axis is not None:
            scale = scale.view([-1 if d == self.axis else 1 for d in range(x.ndim)])
        rounded: Tensor = _Round.apply(x, scale, self.low, self.high, exact)
        return rounded


class _Scaled(torch.autograd.Function):
    """The identity, whose gradient is multiplied by a factor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient * ctx.factor, None
