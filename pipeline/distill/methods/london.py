"""Shang et al., "Lipschitz continuity guided knowledge distillation", ICCV 2021."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.core.errors import UserError
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class LondonConfig:
    """Ours; the iterations are the authors'.

    Their weight, 0.004 for CIFAR-100, is that of an absolute difference, whose unit is the features'.
    """

    weight: NonNegativeFloat = 1.0
    iterations: PositiveInt = 10  # of the power method


def spectral_norm(before: Tensor, after: Tensor, iterations: int) -> Tensor:
    """Largest singular value (B,) of the transmitting matrix of each image, X^T Y / N.

    X (B, N, c) and Y (B, N, e) are the features of two layers at the same N positions. The matrix stands for the
    layers between them, and its spectral norm for their Lipschitz constant. Power iterations on its product with
    its transpose, in which the matrix (c x e) is never built; singular vectors have no gradient, as the
    derivative of a singular value is u v^T.
    """
    n = before.shape[1]
    x, y = before.detach(), after.detach()
    u = x.new_ones(x.shape[0], x.shape[2], 1)
    with torch.no_grad():
        for _ in range(iterations):
            v = F.normalize(y.mT @ (x @ u) / n, dim=1)
            u = F.normalize(x.mT @ (y @ v) / n, dim=1)
        v = F.normalize(y.mT @ (x @ u) / n, dim=1)
    return ((before @ u) * (after @ v)).sum((1, 2)) / n


class London(Term):
    """`london`: the Lipschitz constant of the student's last stage against that of the teacher's last block.

    The paper has one for every pair of neighbouring stages. The feature cache has the last block of the teacher:
    its values V, what the block reads of its input, and its output h_T. Of the student these are the last two
    feature maps, the first pooled to the grid of the second. The difference is relative to the teacher's constant,
    where the authors' code takes the absolute one behind connectors that are trained to meet the teacher's
    features: tokens of a ViT and maps of a CNN have no common unit. Their code adds this term to `ofd`, so theirs
    is `ofd+london`.

    Raises UserError: a student with one feature map.
    """

    losses = {"london": "weight"}
    teacher = frozenset({"qkv", "tokens"})
    student = frozenset({"stages"})

    def __init__(self, config: LondonConfig, sizes: Sizes) -> None:
        super().__init__()
        if len(sizes.spec.stages) < 2:
            raise UserError(
                f"distill.student: got a student with feature map {', '.join(sizes.spec.stages)} alone for method "
                "london; expected two or more, as it compares neighbouring ones; choose another"
            )
        self.config = config

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """((s - t) / t)^2 of the two spectral norms, mean over images."""
        values = teacher.attention_inputs[:, :, 2].flatten(2)
        theirs = spectral_norm(values, teacher.tokens, self.config.iterations)
        before, after = outputs.stages[-2:]
        if before.shape[-2:] != after.shape[-2:]:
            before = F.adaptive_avg_pool2d(before, (after.shape[-2], after.shape[-1]))
        ours = spectral_norm(tokens_of(before), tokens_of(after), self.config.iterations)
        return {"london": (ours / theirs.clamp(min=1e-6) - 1).square().mean()}
