"""Cross-entropy with the mixed labels of mixed views: what teacher and student are trained by."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F


def mixed_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    partner_labels: Tensor,
    shares: Tensor | None,
    smoothing: float = 0.0,
) -> Tensor:
    """Cross-entropy of each image (B,): logits (B, K), labels (B,) with -1 for none, whose loss is 0.

    shares (B,) of an image's own label, the rest is its partner's; None where no view is mixed.
    """

    def of(target: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, target, ignore_index=-1, reduction="none", label_smoothing=smoothing
        )

    if shares is None:
        return of(labels)
    return shares * of(labels) + (1 - shares) * of(partner_labels)
