"""A trained CNN that guides the teacher's training: it answers on the very views that the ViT sees.

Answers: Touvron et al., "Training data-efficient image transformers & distillation through attention", ICML 2021,
section 4 (soft distillation). Features: Li et al., "Locality Guidance for Improving Vision Transformers on Tiny
Datasets", ECCV 2022. A convolution's bias towards neighbouring pixels is what a ViT lacks on a small data set.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.models import checkpoint
from pipeline.models.student import Taps, check_feature_maps, probe_student


class Guide(nn.Module):
    """A frozen CNN of this pipeline, read at its logits and its last feature map."""

    def __init__(self, path: Path, prepared: Prepared) -> None:
        """Load it. Raises UserError: no such checkpoint, other classes, another image size, no feature map."""
        super().__init__()
        self.network, description = checkpoint.load(path)
        self.network.requires_grad_(False)
        self.preprocess: dict[str, Any] = description["preprocess"]
        classes, size = tuple(description["classes"]), self.preprocess["image_size"]
        if (classes, size) != (prepared.classes, prepared.image_size):
            raise UserError(
                f"teach.guide: {path}: got {len(classes)} classes at {size} px; expected the "
                f"{len(prepared.classes)} of {prepared.folder} at {prepared.image_size} px, by the same names; "
                "train the guide on these images"
            )
        spec = probe_student(self.network, size)
        check_feature_maps(self.network, spec)
        self._tap = spec.stages[-1]
        self.channels = spec.stage_channels[-1]

    @torch.no_grad()
    def forward(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Views (B, 3, S, S) uint8 -> logits (B, K) and the last map (B, c, h, w)."""
        self.network.eval()
        with Taps(self.network, [self._tap]) as taps:
            logits = self.network(views.normalise(pixels, self.preprocess))
            return logits, taps.features[self._tap]


def answers(logits: Tensor, guided_by: Tensor, temperature: float) -> Tensor:
    """T^2 KL(guide || ViT) of each image (B,), from logits (B, K); in float32, as autocast on a CPU is not."""
    target = F.log_softmax(guided_by.float() / temperature, dim=1)
    own = F.log_softmax(logits.float() / temperature, dim=1)
    return temperature**2 * F.kl_div(own, target, reduction="none", log_target=True).sum(1)


def features(tokens: Tensor, guided_by: Tensor, grid: tuple[int, int]) -> Tensor:
    """Mean squared difference (B,) between projected tokens (B, N, c) and the guide's map (B, c, h, w).

    The map is resized to the token grid; each position is standardised over its channels on both sides, so that
    neither scale matters.
    """
    resized = F.interpolate(guided_by.float(), grid, mode="bilinear", align_corners=False)
    target = resized.flatten(2).mT
    own, other = (F.layer_norm(t, t.shape[-1:]) for t in (tokens.float(), target))
    return (own - other).square().mean(dim=(1, 2))
