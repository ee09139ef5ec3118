"""L_proj2 of eq. 5 and 6 as one torch operator over the Triton kernels: loss and projection, all gradients.

Three launches: dropout, product with residual and loss, gradients. The upstream scalar is read on the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula


@torch.library.custom_op("cakd::fused_gl", mutates_args=())
def fused_gl_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor | None,
    ids: Tensor,
    stream: Tensor,
    order: Sequence[int],
    sizes: Sequence[int],
    p: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Of x (B, N, c) behind dropout `p`: loss of eq. 6, Proj2(x) (B, N, D); residual and dropped x.

    Group g has the next sizes[g] tokens of `order`. Without a target the loss is 0, the residual empty;
    without dropout the dropped x is empty.
    """
    from pipeline.distill.kernels import dropout, group_linear

    dropped = dropout.dropout(x, ids, stream, p) if p else x.new_empty(0)
    outputs = group_linear.project(dropped if p else x, weight, bias, target, order, sizes)
    return (*outputs, dropped)


@torch.library.custom_op("cakd::fused_gl_gradient", mutates_args=())
def fused_gl_gradient_op(
    x: Tensor,
    weight: Tensor,
    residual: Tensor,
    up_loss: Tensor | None,
    up_out: Tensor | None,
    ids: Tensor,
    stream: Tensor,
    order: Sequence[int],
    sizes: Sequence[int],
    p: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of x before its dropout, of weight and bias; x as the product read it."""
    from pipeline.distill.kernels import group_linear

    return group_linear.gradients(
        x, weight, residual, up_loss, up_out, order, sizes, ids, stream, p
    )


@fused_gl_op.register_fake
def _(x: Tensor, weight: Tensor, *others: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    out = torch.empty((*x.shape[:2], weight.shape[1]), dtype=x.dtype, device=x.device)
    residual = torch.empty_like(out) if others[1] is not None else out.new_empty(0)
    dropped = (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if others[-1] else out.new_empty(0)
    )
    return x.new_empty((), dtype=torch.float32), out, residual, dropped


@fused_gl_gradient_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, ids, stream, *ctx.layout = inputs
    _, _, residual, dropped = output
    ctx.set_materialize_grads(False)  # else zeros for outputs that nobody derives
    ctx.mark_non_differentiable(residual, dropped)
    ctx.save_for_backward(dropped if dropped.numel() else x, weight, residual, ids, stream)


def _through(ctx: Any, up_loss: Tensor | None, up_out: Tensor | None, *_: None) -> tuple[Any, ...]:
    x, weight, residual, ids, stream = ctx.saved_tensors
    if not residual.numel():
        up_loss = None
    if up_loss is None and up_out is None:
        return (None,) * 9
    upstream = (residual, up_loss, up_out)
    return (*fused_gl_gradient_op(x, weight, *upstream, ids, stream, *ctx.layout), *(None,) * 6)


fused_gl_op.register_autograd(_through, setup_context=_keep)
for _device in ("cuda", "cpu"):
    fused_gl_op.register_autocast(_device, torch.bfloat16)


@register_flop_formula(torch.ops.cakd.fused_gl)
def _forward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One product N x c x D a sample, whatever the groups."""
    return int(2 * x[0] * x[1] * x[2] * weight[1])


@register_flop_formula(torch.ops.cakd.fused_gl_gradient)
def _gradient_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One product for the tokens, one for the weights."""
    return 2 * _forward_flops(x, weight)
