"""L_proj1 of eq. 4 as one torch operator over the Triton kernels: losses forward, the whole gradient backward.

The gradient reads the upstream scalars of both terms on the device and writes d qkv_S once, so that nothing is
scaled, added or copied around the kernels, and nothing waits for the device.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

Saved = tuple[Tensor, Tensor, Tensor]


@torch.library.custom_op("cakd::fused_pca", mutates_args=())
def fused_pca_op(
    qkv_s: Tensor,
    qkv_t: Tensor,
    ids: Tensor,
    stream: Tensor,
    p: float,
    granularity: str,
    impl: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Attention and Gram terms, float32 scalars, of packed qkv (B, N, 3, H, d); and what the gradient reads.

    `impl` is `small` or `flash`. For `flash` the gradient reads 2 E (B, H, N, d), log-sum-exp and delta (B, H, N);
    for `small` nothing: they are empty.
    """
    if impl == "small":
        from pipeline.distill.kernels import small

        losses = small.losses(qkv_s, qkv_t, ids, stream, p, granularity)
        return (*losses, *_saved(qkv_s, impl))
    from pipeline.distill.kernels import flash

    losses, saved = flash.losses(qkv_s, qkv_t, ids, stream, p, granularity)
    return (*losses, *saved)


@torch.library.custom_op("cakd::fused_pca_gradient", mutates_args=())
def fused_pca_gradient_op(
    qkv_s: Tensor,
    qkv_t: Tensor,
    doubled: Tensor,
    log_sums: Tensor,
    deltas: Tensor,
    up_attention: Tensor,
    up_gram: Tensor,
    ids: Tensor,
    stream: Tensor,
    p: float,
    granularity: str,
    impl: str,
) -> Tensor:
    """The gradient of packed qkv_S by the upstream scalars of both terms, contiguous."""
    upstream = up_attention, up_gram
    if impl == "small":
        from pipeline.distill.kernels import small

        return small.gradient(qkv_s, qkv_t, *upstream, ids, stream, p, granularity)
    from pipeline.distill.kernels import flash_gradient

    saved = doubled, log_sums, deltas
    return flash_gradient.gradient(qkv_s, qkv_t, saved, *upstream, ids, stream, p, granularity)


def _saved(qkv: Tensor, impl: str) -> Saved:
    """Memory for what the gradient reads beside its inputs."""
    batch, n, _, n_heads, width = qkv.shape
    rows = (batch, n_heads, n) if impl == "flash" else (0,)
    log_sums, deltas = (qkv.new_empty(rows, dtype=torch.float32) for _ in range(2))
    return qkv.new_empty((*rows, width) if impl == "flash" else rows), log_sums, deltas


@fused_pca_op.register_fake
def _(qkv_s: Tensor, *others: Any) -> tuple[Tensor, ...]:
    losses = (qkv_s.new_empty((), dtype=torch.float32) for _ in range(2))
    return (*losses, *_saved(qkv_s, others[-1]))


@fused_pca_gradient_op.register_fake
def _(qkv_s: Tensor, *_: object) -> Tensor:
    return torch.empty(qkv_s.shape, dtype=qkv_s.dtype, device=qkv_s.device)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    qkv_s, qkv_t, ids, stream, *ctx.draw = inputs
    ctx.set_materialize_grads(False)  # else zeros for outputs that nobody derives
    ctx.mark_non_differentiable(*output[2:])
    ctx.save_for_backward(qkv_s, qkv_t, *output[2:], ids, stream)


def _through(
    ctx: Any, up_attention: Tensor | None, up_gram: Tensor | None, *_: None
) -> tuple[Any, ...]:
    *operands, ids, stream = ctx.saved_tensors
    if up_attention is None and up_gram is None:
        return (None,) * 7
    upstream = (_nothing(ids.device) if up is None else up for up in (up_attention, up_gram))
    gradient = fused_pca_gradient_op(*operands, *upstream, ids, stream, *ctx.draw)
    return (gradient, *(None,) * 6)


@lru_cache(maxsize=8)
def _nothing(device: torch.device) -> Tensor:
    """The upstream gradient of a term that nobody derives; made once a device, outside any capture."""
    return torch.zeros((), device=device)


fused_pca_op.register_autograd(_through, setup_context=_keep)
for _device in ("cuda", "cpu"):
    fused_pca_op.register_autocast(_device, torch.bfloat16)


@register_flop_formula(torch.ops.cakd.fused_pca)
def _loss_flops(qkv: Any, *args: Any, **_: Any) -> int:
    """Four products N x N x d a head, and for Gram one more (`small`) or three N x d x d (`flash`)."""
    batch, n, _three, n_heads, width = qkv
    gram = n * n * width if args[5] == "small" else 3 * n * width * width
    return int(2 * batch * n_heads * (4 * n * n * width + gram))


@register_flop_formula(torch.ops.cakd.fused_pca_gradient)
def _gradient_flops(qkv: Any, *args: Any, **_: Any) -> int:
    """`small` repeats the forward products; `flash` the student's scores and dP, in each half."""
    batch, n, _three, n_heads, width = qkv
    if args[-1] == "small":
        return int(2 * batch * n_heads * (8 + 2) * n * n * width)
    return int(2 * batch * n_heads * (7 * n * n * width + 5 * n * width * width))
