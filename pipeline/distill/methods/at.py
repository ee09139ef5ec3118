"""Attention transfer: Zagoruyko and Komodakis, "Paying more attention to attention", ICLR 2017."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid, tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class AtConfig:
    """The paper's beta of 1000, over the elements of the one map that is compared and the batch."""

    weight: NonNegativeFloat = 1000.0


def attention_map(tokens: Tensor) -> Tensor:
    """The sum of squares over channels (B, N, c), eq. 1 with p = 2, as a vector of length 1 (B, N)."""
    return F.normalize(tokens.square().sum(2), dim=1)


class At(Term):
    """`at`."""

    losses = {"at": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})

    def __init__(self, config: AtConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Squared distance of the two maps, mean over elements and images."""
        assert outputs.feature is not None
        ours = attention_map(tokens_of(on_grid(outputs.feature, self.grid)))
        return {"at": F.mse_loss(ours, attention_map(teacher.tokens))}
