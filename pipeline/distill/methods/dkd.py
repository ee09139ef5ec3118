"""Decoupled knowledge distillation: Zhao et al., CVPR 2022."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT, Share
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, one_hot
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class DkdConfig:
    """The paper's CIFAR-100 setting; its 20 epochs of warm-up in 240 are a share here."""

    weight: NonNegativeFloat = 1.0
    alpha: NonNegativeFloat = 1.0  # of the target class against all others
    beta: NonNegativeFloat = 8.0  # weight of the non-target classes
    temperature: PositiveFloat = 4.0
    warmup: Share = 0.0833


def decoupled(
    student: Tensor, teacher: Tensor, target: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 TCKD and T^2 NCKD of each image (B,), eq. 4 to 7; logits (B, K), target (B,).

    KL(teacher || student) = TCKD + (1 - p_t) NCKD, p_t the teacher's probability of the target class.
    """
    hot = one_hot(target, student.shape[1])

    def split(logits: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of target and not target (B, 2); of the non-target classes, 0 at the target."""
        p = F.log_softmax(logits / temperature, dim=1)
        others = p.masked_fill(hot, -torch.inf)
        rest = others.logsumexp(1, keepdim=True)
        return torch.cat((p.gather(1, target[:, None]), rest), dim=1), (others - rest).masked_fill(
            hot, 0
        )

    (kind_t, others_t), (kind_s, others_s) = split(teacher), split(student)
    target_part = (kind_t.exp() * (kind_t - kind_s)).sum(1)
    # The target's column adds 1 (0 - 0).
    others_part = (others_t.exp() * (others_t - others_s)).sum(1)
    return target_part * temperature**2, others_part * temperature**2


class Dkd(Term):
    """`dkd`: the target is the label; for an image without one, the teacher's argmax."""

    losses = {"dkd": "weight"}

    def __init__(self, config: DkdConfig, _: Sizes) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """alpha TCKD + beta NCKD, mean over images."""
        target, others = decoupled(
            outputs.logits, teacher.logits, outputs.targets(teacher), self.config.temperature
        )
        return {"dkd": (self.config.alpha * target + self.config.beta * others).mean()}
