"""Logit distillation: Hinton et al., "Distilling the knowledge in a neural network", 2015."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class LogitsConfig:
    """A term of its own that never hides inside `cakd` (decision 18)."""

    weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 4.0


def divergence(student: Tensor, teacher: Tensor, temperature: float) -> Tensor:
    """T^2 KL(softmax(teacher / T) || softmax(student / T)), mean over images; both (B, K)."""
    log_student = F.log_softmax(student / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher / temperature, dim=-1)
    return temperature**2 * F.kl_div(
        log_student, log_teacher, reduction="batchmean", log_target=True
    )


class Logits(Term):
    """`logits`."""

    losses = {"logits": "weight"}

    def __init__(self, config: LogitsConfig, _: Sizes) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """T^2 KL of the class distributions."""
        return {"logits": divergence(outputs.logits, teacher.logits, self.config.temperature)}
