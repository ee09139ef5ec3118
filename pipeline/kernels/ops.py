"""Who computes the projector losses: the dispatch, and which one and why."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.errors import UserError, nearest
from pipeline.kernels import reference
from pipeline.kernels.philox import Key
from pipeline.kernels.reference import Granularity


def sdpa_pca_loss(
    qkv_s: Tensor, qkv_t: Tensor, key: Key, p: float, granularity: Granularity
) -> tuple[Tensor, Tensor]:
    """`reference.pca_loss` with PyTorch's fused attention: no N x N tensor is kept for the backward."""
    mixed = reference.swap_mix(qkv_s, qkv_t, key, p, granularity)
    student = F.scaled_dot_product_attention(*reference.heads(mixed))
    with torch.no_grad():
        teacher = F.scaled_dot_product_attention(*reference.heads(qkv_t))
    gram = reference.gram_loss(reference.heads(qkv_s)[2], reference.heads(qkv_t)[2])
    return F.mse_loss(student, teacher), gram


PCA_LOSSES = {"eager": reference.pca_loss, "sdpa": sdpa_pca_loss}
IMPLS = ("auto", *PCA_LOSSES)


def choose(impl: str, device: torch.device) -> tuple[str, str]:
    """The implementation that will run and the reason. Raises UserError: unknown `impl`."""
    if impl not in IMPLS:
        raise UserError(f"kernels impl: got {impl!r}; {nearest(impl, IMPLS)}")
    if impl != "auto":
        return impl, "asked for by name"
    if device.type == "cpu":
        return "eager", "a CPU: the reference in plain torch"
    return "sdpa", f"{device.type}: fused attention of PyTorch keeps no N x N tensor"


def pca_loss(
    qkv_s: Tensor,
    qkv_t: Tensor,
    key: Key,
    p: float = 0.5,
    granularity: Granularity = "element",
    impl: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention and Gram terms of eq. 4 by the chosen implementation; see `reference.pca_loss`."""
    name, _ = choose(impl, qkv_s.device)
    return PCA_LOSSES[name](qkv_s, qkv_t, key, p, granularity)


gl_mse = reference.gl_mse  # eq. 5 and 6: one implementation yet
