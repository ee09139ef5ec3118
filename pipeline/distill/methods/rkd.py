"""Relational knowledge distillation: Park et al., CVPR 2019."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, pairwise_distances, pooled
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class RkdConfig:
    """The paper's weights of RKD-DA."""

    distance_weight: NonNegativeFloat = 25.0
    angle_weight: NonNegativeFloat = 50.0


COINCIDE = (
    1e-8  # squared distance of two embeddings, of the mean one, below which they are one point
)


def distances(x: Tensor) -> Tensor:
    """Distances (B, B) between embeddings (B, e), in units of their mean."""
    pairs = pairwise_distances(x)
    count = (pairs > 0).sum()
    mean = pairs.sum() / count.clamp(min=1)
    return pairs / torch.where(count > 0, mean, 1)


def angles(x: Tensor) -> Tensor:
    """Cosine of the angle at j of every triplet (j, i, k) of embeddings (B, e) -> (B, B, B); 0 where two coincide.

    An image may stand twice in a batch: the direction between its two embeddings is rounding, and is left out.
    """
    towards = x[None, :, :] - x[:, None, :]
    square = towards.square().sum(2, keepdim=True)
    apart = square > COINCIDE * square.mean()
    towards = towards / torch.where(apart, square, 1).sqrt() * apart
    return towards @ towards.mT


class Rkd(Term):
    """`rkd_distance`, `rkd_angle`: of the embeddings; B^3 angles, so B is better not above some 256."""

    losses = {"rkd_distance": "distance_weight", "rkd_angle": "angle_weight"}
    teacher = frozenset({"pooled"})
    student = frozenset({"embedding"})

    def __init__(self, config: RkdConfig, _: Sizes) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Huber losses of distances and of angles."""
        losses = {}
        for name, relation in (("distance", distances), ("angle", angles)):
            with torch.no_grad():
                theirs = relation(pooled(teacher))
            losses[f"rkd_{name}"] = F.smooth_l1_loss(relation(outputs.embedding), theirs)
        return losses
