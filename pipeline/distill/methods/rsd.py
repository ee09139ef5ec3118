"""Redundancy suppression distillation: Zhang et al., "Cross-architecture distillation made simple", ICCV 2025."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, pooled
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class RsdConfig:
    """The authors' for CIFAR-100; expansion is ours."""

    weight: NonNegativeFloat = 0.1
    kappa: NonNegativeFloat = 0.01  # of what lies off the diagonal
    expansion: PositiveInt = 2  # hidden width of the decoupling layers, in the student's width


def cross_correlation(student: Tensor, teacher: Tensor) -> Tensor:
    """Of the batch's embeddings, each dimension standardised over the batch: (B, D) and (B, D) -> (D, D)."""
    ours, theirs = ((x - x.mean(0)) / (x.std(0, unbiased=False) + 1e-5) for x in (student, teacher))
    return theirs.T @ ours / len(student)


def suppressed(student: Tensor, teacher: Tensor, kappa: float) -> Tensor:
    """sum (C_ii - 1)^2 + kappa sum_{i != j} C_ij^2 over the D dimensions."""
    c = cross_correlation(student, teacher)
    same = torch.eye(len(c), device=c.device, dtype=c.dtype)
    weights = same + kappa * (1 - same)
    return (weights * (c - same).square()).sum()


class Rsd(Term):
    """`rsd`: the student's embedding through decoupling layers against the teacher's."""

    losses = {"rsd": "weight"}
    teacher = frozenset({"pooled"})
    student = frozenset({"embedding"})

    def __init__(self, config: RsdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        hidden = config.expansion * sizes.spec.embedding
        self.decouple = nn.Sequential(
            nn.Linear(sizes.spec.embedding, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.GELU(),
            nn.Linear(hidden, sizes.space.width, bias=False),
        )

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Distance of the cross-correlation from the identity."""
        ours = self.decouple(outputs.embedding)
        return {"rsd": suppressed(ours, pooled(teacher), self.config.kappa)}
