"""One-for-all distillation between unlike architectures: Hao et al., "OFA-KD", NeurIPS 2023."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.methods.term import Seen, Sizes, Term
from pipeline.teacher import Tokens


@dataclass(frozen=True)
class OfaConfig:
    """The authors' CIFAR-100 setting; on ImageNet they take gamma 1.5."""

    weight: float = 1.0
    gamma: float = 1.0  # above 1 the target class counts more where the teacher is sure
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(f"temperature is {self.temperature}; allowed: above 0")


def enhanced(
    student: Tensor, teacher: Tensor, target: Tensor, gamma: float, temperature: float = 1.0
) -> Tensor:
    """-(1 + p_T)^gamma log p_S of the target, - p_T log p_S of the others, mean over images (eq. 4).

    Logits (B, K), target (B,). With gamma 1 it is the cross-entropy with the label plus that with the teacher.
    """
    log_p = F.log_softmax(student / temperature, dim=1)
    theirs = F.softmax(teacher / temperature, dim=1)
    hot = F.one_hot(target, student.shape[1])
    weights = (1 - hot) * theirs + hot * (1 + theirs) ** gamma
    return -(weights * log_p).sum(1).mean()


class Ofa(Term):
    """`ofa`: every stage of the student answers through a branch of its own, held against the teacher's logits.

    A branch is pooling, batch norm and a linear layer. Dropped after the training, as in the paper.
    """

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
            for channels in sizes.anatomy.stage_channels
        )

    def forward(self, seen: Seen, taught: Tokens) -> dict[str, Tensor]:
        """The enhanced loss of every branch and of the student's own logits, summed."""
        answers = [branch(x) for branch, x in zip(self.branches, seen.stages)] + [seen.logits]
        target, config = seen.targets(taught), self.config
        losses = [
            enhanced(a, taught.logits, target, config.gamma, config.temperature) for a in answers
        ]
        return {"ofa": sum(losses[1:], losses[0])}

    def weights(self, progress: float) -> dict[str, float]:  # noqa: ARG002
        """Constant."""
        return {"ofa": self.config.weight}
