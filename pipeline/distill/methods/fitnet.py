"""Hints for thin deep nets: Romero et al., "FitNets", ICLR 2015."""

from __future__ import annotations

from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid, tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class FitnetConfig:
    """The weight of the mean in the code of CRD's authors. Trained beside the classification, not before it."""

    weight: NonNegativeFloat = 100.0


class Fitnet(Term):
    """`fitnet`: a 1x1 convolution takes the student's tap to the teacher's width."""

    losses = {"fitnet": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})

    def __init__(self, config: FitnetConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        self.regressor = nn.Conv2d(sizes.channels, sizes.space.width, 1)

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """mse(h_T, r(h_S)), eq. 3 as a mean."""
        assert outputs.feature is not None
        hint = tokens_of(self.regressor(on_grid(outputs.feature, self.grid)))
        return {"fitnet": F.mse_loss(hint, teacher.tokens)}
