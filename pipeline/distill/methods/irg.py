"""Liu et al., "Knowledge distillation via instance relationship graph", CVPR 2019."""

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
class IrgConfig:
    """The paper's for CIFAR-10."""

    vertex_weight: NonNegativeFloat = 0.1
    edge_weight: NonNegativeFloat = 5.0
    transform_weight: NonNegativeFloat = 5.0


def edges(x: Tensor) -> Tensor:
    """Squared distances (B, B) of a layer's features (B, e), in units of their mean.

    The authors' code divides by the largest distance. One outlier of a batch then sets the scale of all edges, so
    the mean is taken here; either makes layers of different widths comparable.
    """
    squared = pairwise_distances(x).square()
    return squared / squared.mean().clamp(min=1e-12)


class Irg(Term):
    """`irg_vertex`, `irg_edge`, `irg_transform`, over two layers: the embedding and the logits.

    Vertices are compared where both nets have the same width, at the logits. The paper's transformation of
    vertices is the change of a vertex from layer to layer, a difference of equal widths; embedding and logits have
    unequal ones in both nets, so the change of the edges alone is compared.
    """

    losses = {
        "irg_vertex": "vertex_weight",
        "irg_edge": "edge_weight",
        "irg_transform": "transform_weight",
    }
    teacher = frozenset({"logits", "pooled"})
    student = frozenset({"embedding"})

    def __init__(self, config: IrgConfig, _: Sizes) -> None:
        super().__init__()
        self.config = config

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Mean squared differences of vertices, of edges at both layers, of what the edges become in between."""
        with torch.no_grad():
            theirs = edges(pooled(teacher)), edges(teacher.logits)
        ours = edges(outputs.embedding), edges(outputs.logits)
        return {
            "irg_vertex": F.mse_loss(outputs.logits, teacher.logits),
            "irg_edge": (F.mse_loss(ours[0], theirs[0]) + F.mse_loss(ours[1], theirs[1])) / 2,
            "irg_transform": F.mse_loss(ours[1] - ours[0], theirs[1] - theirs[0]),
        }
