"""Activation boundaries: Heo et al., "Knowledge transfer via distillation of activation boundaries", AAAI 2019."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid, tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class AbConfig:
    """The paper's margin mu. The paper trains this loss alone, so no weight stands against another: 1 here."""

    weight: NonNegativeFloat = 1.0
    margin: PositiveFloat = 1.0  # mu


def boundary(student: Tensor, teacher: Tensor, margin: float) -> Tensor:
    """The paper's differentiable form of ||rho(T) - rho(S)||_1, rho(x) = [x > 0], mean over elements.

    (rho(T) relu(mu - S) + (1 - rho(T)) relu(mu + S))^2: only the sign of the teacher's element counts, and an
    element of the student costs nothing once it is on the same side by the margin mu.
    """
    short = (margin - student).relu().where(teacher > 0, (margin + student).relu())
    return short.square().mean()


class Ab(Term):
    """`ab`: the neurons are the teacher's token channels; a connector, 1x1 convolution + batch norm, meets them.

    The paper's neuron is read before its ReLU. No ReLU follows h_T, so its boundary is 0, about which LayerNorm
    centres the channels of a token. The paper initialises the student by this loss and then trains it by labels
    alone; here one training has both, as for every method.
    """

    losses = {"ab": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})

    def __init__(self, config: AbConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        self.connector = nn.Sequential(
            nn.Conv2d(sizes.channels, sizes.space.width, 1, bias=False),
            nn.BatchNorm2d(sizes.space.width),
        )

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The loss on the tap, brought to the token grid."""
        assert outputs.feature is not None
        ours = tokens_of(self.connector(on_grid(outputs.feature, self.grid)))
        return {"ab": boundary(ours, teacher.tokens, self.config.margin)}
