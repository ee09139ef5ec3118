"""L_proj1 of eq. 4 by the selected implementation; those beside `fused_pca` as operators.

`fused_pca` has the operator of `small` and `flash`. Those of this file return a loss and the gradient that the
forward computed along the way, in units of 1 / (B H N d); the backward multiplies it by the upstream scalar.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

from pipeline.distill.kernels import eager, reference
from pipeline.distill.kernels.choice import choose_pca, has_triton
from pipeline.distill.kernels.configs import WIDEST_GRAM
from pipeline.distill.kernels.fused_pca import fused_pca_op
from pipeline.distill.kernels.philox import Key
from pipeline.distill.kernels.reference import Granularity


@torch.library.custom_op("cakd::swap_mix", mutates_args=())
def swap_mix_op(
    qkv_s: Tensor, qkv_t: Tensor | None, ids: Tensor, stream: Tensor, p: float, granularity: str
) -> Tensor:
    """g() of eq. 3 on packed qkv (B, N, 3, H, d); no teacher: zeros where the mask says."""
    if qkv_s.is_cuda and has_triton():
        from pipeline.distill.kernels import swap_mix

        return swap_mix.swap_mix(qkv_s, qkv_t, ids, stream, p, granularity)
    other = torch.zeros_like(qkv_s) if qkv_t is None else qkv_t
    mixed = reference.swap_mix(qkv_s, other, Key.of(ids, stream), p, granularity)  # type: ignore[arg-type]
    return mixed.contiguous()


@torch.library.custom_op("cakd::attention_loss", mutates_args=())
def attention_loss_op(
    qkv_s: Tensor,
    qkv_t: Tensor,
    ids: Tensor,
    stream: Tensor,
    p: float,
    granularity: str,
) -> tuple[Tensor, Tensor]:
    """The attention term of eq. 4, float32 scalar, and its gradient times B H N d, packed."""
    return eager.attention_loss(qkv_s, qkv_t, Key.of(ids, stream), p, granularity)  # type: ignore[arg-type]


@torch.library.custom_op("cakd::gram_loss", mutates_args=())
def gram_loss_op(v_s: Tensor, v_t: Tensor) -> tuple[Tensor, Tensor]:
    """The Gram term of eq. 4 of V (B, N, H, d), float32 scalar, and its gradient times B H N d."""
    if v_s.is_cuda and has_triton() and v_s.shape[-1] <= WIDEST_GRAM:
        from pipeline.distill.kernels import gram as kernels_gram

        return kernels_gram.gram(v_s, v_t)
    loss, gradient = eager.gram_loss(v_s, v_t)
    return loss, gradient.contiguous()


def _scalar_of(tensor: Tensor) -> Tensor:
    return tensor.new_empty((), dtype=torch.promote_types(tensor.dtype, torch.float32))


@swap_mix_op.register_fake
def _(qkv_s: Tensor, *_: object) -> Tensor:
    return torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)


@attention_loss_op.register_fake
def _(qkv_s: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return _scalar_of(qkv_s), torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)


@gram_loss_op.register_fake
def _(v_s: Tensor, _: Tensor) -> tuple[Tensor, Tensor]:
    return _scalar_of(v_s), torch.empty(v_s.shape, dtype=v_s.dtype, device=v_s.device)


def _keep_draw(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ARG001
    ctx.save_for_backward(inputs[2], inputs[3])
    ctx.p, ctx.granularity = inputs[4:]


def _through_mix(ctx: Any, upstream: Tensor) -> tuple[Any, ...]:
    mine = swap_mix_op(upstream.contiguous(), None, *ctx.saved_tensors, ctx.p, ctx.granularity)
    return mine, None, None, None, None, None


def _keep_gradient(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    gradient = output[1]
    ctx.set_materialize_grads(
        False
    )  # else zeros as large as the gradient, for an output nobody derives
    ctx.mark_non_differentiable(gradient)
    ctx.save_for_backward(gradient)
    ctx.inputs = len(inputs)
    ctx.count = gradient.numel() // (3 if len(inputs) > 2 else 1)


def _times_upstream(ctx: Any, upstream: Tensor | None, _: Tensor | None) -> tuple[Any, ...]:
    (gradient,) = ctx.saved_tensors
    mine = None if upstream is None else (gradient * (upstream / ctx.count)).to(gradient.dtype)
    return (mine, *(None,) * (ctx.inputs - 1))


swap_mix_op.register_autograd(_through_mix, setup_context=_keep_draw)
for _op in (attention_loss_op, gram_loss_op):
    _op.register_autograd(_times_upstream, setup_context=_keep_gradient)
for _op in (swap_mix_op, attention_loss_op, gram_loss_op):
    for _device in ("cuda", "cpu"):
        _op.register_autocast(_device, torch.bfloat16)


@register_flop_formula(torch.ops.cakd.attention_loss)
def _attention_flops(qkv: Any, *_: Any, **__: Any) -> int:
    """Eight products of N x N x d a head."""
    batch, n, _three, n_heads, width = qkv
    return int(2 * 8 * batch * n_heads * n * n * width)


@register_flop_formula(torch.ops.cakd.gram_loss)
def _gram_flops(v: Any, *_: Any, **__: Any) -> int:
    """Three products for R^T R, M^T M and G, two for the gradient, each N x d x d a head."""
    batch, n, n_heads, width = v
    return int(2 * 5 * batch * n_heads * n * width * width)


def pca_loss(
    qkv_s: Tensor,
    qkv_t: Tensor,
    key: Key,
    p: float = 0.5,
    granularity: Granularity = "element",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention and Gram terms of eq. 4 by the selected implementation: see `reference.pca_loss`."""
    name, _ = choose_pca(impl, qkv_s.device, qkv_s.shape[1], qkv_s.shape[-1])
    qkv_t = qkv_t.to(qkv_s.dtype)
    if qkv_s.is_cuda:  # the kernels read a head's columns side by side
        qkv_s, qkv_t = (v if v.stride(-1) == 1 else v.contiguous() for v in (qkv_s, qkv_t))
    drawn = (key.ids.to(torch.int64), key.stream(), p, granularity)
    if name in ("small", "flash"):
        attention, gram, *_ = fused_pca_op(qkv_s, qkv_t, *drawn, name)
        return attention, gram
    gram, _ = gram_loss_op(qkv_s[:, :, 2], qkv_t[:, :, 2])
    if name == "eager":
        return attention_loss_op(qkv_s, qkv_t, *drawn)[0], gram
    mixed = swap_mix_op(qkv_s, qkv_t, *drawn)
    student = F.scaled_dot_product_attention(*reference.heads(mixed))
    with torch.no_grad():
        teacher = F.scaled_dot_product_attention(*reference.heads(qkv_t))
    wide = torch.promote_types(qkv_s.dtype, torch.float32)
    return F.mse_loss(student.to(wide), teacher.to(wide)), gram
