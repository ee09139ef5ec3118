"""Similarities between the positions of an image, as in LightlyTrain's distillation (Lightly, 2025)."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid, tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class AffinityConfig:
    """The temperature is theirs."""

    weight: NonNegativeFloat = 1.0
    temperature: PositiveFloat = 0.07


def log_affinities(tokens: Tensor, temperature: float) -> Tensor:
    """Log softmax of each token's cosines with all tokens of its image: (B, N, c) -> (B, N, N)."""
    unit = F.normalize(tokens, dim=2)
    return F.log_softmax(unit @ unit.mT / temperature, dim=2)


class Affinity(Term):
    """`affinity`: cosines do not depend on the width, so nothing is trained beside the student."""

    losses = {"affinity": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})

    def __init__(self, config: AffinityConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """KL of the teacher's rows to the student's, mean over tokens."""
        assert outputs.feature is not None
        ours = log_affinities(
            tokens_of(on_grid(outputs.feature, self.grid)), self.config.temperature
        )
        theirs = log_affinities(teacher.tokens, self.config.temperature)
        return {"affinity": F.kl_div(ours, theirs, reduction="none", log_target=True).sum(2).mean()}
