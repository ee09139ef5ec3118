"""L_proj2 of eq. 5 and 6 by the selected implementation; those in plain torch as operators.

`fused_gl` has the operator of the Triton kernels. In plain torch the forward returns Proj2(x) - target; the
backward is two products a group of it and of what the adversarial term sends back.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from pipeline.distill.kernels import eager, reference
from pipeline.distill.kernels.choice import choose_gl, has_triton
from pipeline.distill.kernels.fused_gl import fused_gl_op
from pipeline.distill.kernels.philox import Key


@torch.library.custom_op("cakd::dropout", mutates_args=())
def dropout_op(x: Tensor, ids: Tensor, stream: Tensor, p: float) -> Tensor:
    """Dropout of tokens (B, N, c) keyed by sample and step, 0 < p < 1."""
    if x.is_cuda and has_triton():
        from pipeline.distill.kernels import dropout

        return dropout.dropout(x, ids, stream, p)
    return reference.dropout(x, Key.of(ids, stream), p).contiguous()


@torch.library.custom_op("cakd::group_linear", mutates_args=())
def group_linear_op(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor | None,
    order: Sequence[int],
    sizes: Sequence[int],
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of x (B, N, c): the loss of eq. 6, float32 scalar; Proj2(x) (B, N, D); Proj2(x) - target.

    Group g has the next sizes[g] tokens of `order`. Without a target the loss is 0, the residual empty.
    """
    return eager.group_linear(x, weight, bias, target, order, sizes, grouped)


@torch.library.custom_op("cakd::group_linear_backward", mutates_args=())
def group_linear_backward_op(
    x: Tensor,
    weight: Tensor,
    upstream: Tensor,
    order: Sequence[int],
    sizes: Sequence[int],
    grouped: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Of the gradient of Proj2(x) (B, N, D): those of x (B, N, c), weight (G, D, c) and bias (G, D)."""
    return eager.group_linear_backward(x, weight, upstream, order, sizes, grouped)


@dropout_op.register_fake
def _(x: Tensor, *_: object) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


@group_linear_op.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,  # noqa: ARG001
    target: Tensor | None,
    *_: object,
) -> tuple[Tensor, Tensor, Tensor]:
    out = x.new_empty(*x.shape[:2], weight.shape[1])
    residual = torch.empty_like(out) if target is not None else out.new_empty(0)
    return x.new_empty((), dtype=torch.promote_types(x.dtype, torch.float32)), out, residual


@group_linear_backward_op.register_fake
def _(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape), weight.new_empty(weight.shape[:2])


def _keep_draw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[1], inputs[2])
    ctx.p = inputs[3]


def _drop_upstream(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    return dropout_op(upstream, *ctx.saved_tensors, ctx.p), None, None, None


def _keep_products(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, weight, _, _, *ctx.layout = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(output[2])
    ctx.save_for_backward(x, weight, output[2])


def _to_operands(
    ctx: Any, of_loss: Tensor | None, of_out: Tensor | None, _: Tensor | None
) -> tuple[Any, ...]:
    x, weight, residual = ctx.saved_tensors
    upstream = of_out
    if of_loss is not None and residual.numel():
        upstream = (residual * (of_loss * (2 / residual.numel()))).to(residual.dtype)
        upstream = upstream if of_out is None else upstream + of_out
    if upstream is None:
        return (None,) * 7
    gradients = group_linear_backward_op(x, weight, upstream, *ctx.layout)
    return (*gradients, None, None, None, None)


dropout_op.register_autograd(_drop_upstream, setup_context=_keep_draw)
group_linear_op.register_autograd(_to_operands, setup_context=_keep_products)
for _op in (dropout_op, group_linear_op):
    for _device in ("cuda", "cpu"):
        _op.register_autocast(_device, torch.bfloat16)


@register_flop_formula(torch.ops.cakd.group_linear)
def _forward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One product N x c x D a sample, whatever the groups."""
    return int(2 * x[0] * x[1] * x[2] * weight[1])


@register_flop_formula(torch.ops.cakd.group_linear_backward)
def _backward_flops(x: Any, weight: Any, *_: Any, **__: Any) -> int:
    """One product for the tokens, one for the weights."""
    return 2 * _forward_flops(x, weight)


def _layout(groups: Sequence[Sequence[int]]) -> tuple[list[int], list[int]]:
    return [token for group in groups for token in group], [len(group) for group in groups]


def gl_project(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: Sequence[Sequence[int]],
    impl: str = "auto",
) -> Tensor:
    """Group-wise linear by the selected implementation: see `reference.gl_project`."""
    name, _ = choose_gl(impl, x.device, x.dtype, x.shape[2], weight.shape[1], x.shape[1])
    order, sizes = _layout(groups)
    projected: Tensor
    if name == "triton":
        nothing = eager.constant(x.device, 0, 0)
        projected = fused_gl_op(x, weight, bias, None, nothing, nothing, order, sizes, 0.0)[1]
    else:
        projected = group_linear_op(x, weight, bias, None, order, sizes, name == "grouped")[1]
    return projected


def gl_mse(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    target: Tensor,
    groups: Sequence[Sequence[int]],
    dropout_p: float,
    key: Key,
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """L_proj2 of eq. 6 and its projection by the selected implementation: see `reference.gl_mse`."""
    name, _ = choose_gl(impl, x.device, x.dtype, x.shape[2], weight.shape[1], x.shape[1])
    order, sizes = _layout(groups)
    target = target.to(x.dtype)
    ids = key.ids.to(torch.int64)
    if name == "triton":
        drawn, layout = (ids, key.stream()), (order, sizes, dropout_p)
        loss, projected, _, _ = fused_gl_op(x, weight, bias, target, *drawn, *layout)
        return loss, projected
    if dropout_p and x.is_cuda and has_triton():
        x = dropout_op(x, ids, key.stream(), dropout_p)
    else:  # autograd keeps the mask, which a CPU would take as long to draw again as the products take
        x = reference.dropout(x, key, dropout_p)
    loss, projected, _ = group_linear_op(x, weight, bias, target, order, sizes, name == "grouped")
    return loss, projected
