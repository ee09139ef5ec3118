"""One-for-all distillation between unlike architectures: Hao et al., "OFA-KD", NeurIPS 2023."""

from __future__ import annotations

from pydantic import NonNegativeFloat, PositiveFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, one_hot
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class OfaConfig:
    """The defaults of the authors' code; for ImageNet they take gamma 1.5."""

    weight: NonNegativeFloat = 1.0
    gamma: PositiveFloat = 1.0  # above 1 the target class counts more where the teacher is sure
    temperature: PositiveFloat = 1.0


def enhanced(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float = 1.0
) -> Tensor:
    """- sum_c ((p_T(c) + [c = target])^gamma - [c = target]) log p_S(c), mean over images.

    Logits (B, K), target (B,). As in the authors' code the label's own cross-entropy is left out: it is added
    once, for the student's logits. With gamma 1 it is the cross-entropy with the teacher.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    theirs = F.softmax(teacher / temperature, dim=1)
    hot = one_hot(target, student.shape[1]).to(theirs.dtype)
    return -(((theirs + hot) ** gamma - hot) * log_p).sum(1).mean()


class Ofa(Term):
    """`ofa`: every stage of the student gives logits by a branch, which are compared with the teacher's logits.

    A branch is pooling, batch norm and a linear layer; the authors downsample by separable convolutions first.
    """

    losses = {"ofa": "weight"}
    student = frozenset({"stages"})

    def __init__(self, config: OfaConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.branches = nn.ModuleList(
            nn.Sequential(
                nn.AdaptiveAvgPool2d(1),
                nn.Flatten(),
                nn.BatchNorm1d(channels),
                nn.Linear(channels, sizes.classes),
            )
            for channels in sizes.spec.stage_channels
        )

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The enhanced loss of every branch and of the student's own logits, summed."""
        pairs = zip(self.branches, outputs.stages, strict=True)
        answers = [*(branch(x) for branch, x in pairs), outputs.logits]
        target, config = outputs.targets(teacher), self.config
        losses = [
            enhanced(a, teacher.logits, target, config.gamma, config.temperature) for a in answers
        ]
        return {"ofa": sum(losses[1:], losses[0])}
