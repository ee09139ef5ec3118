"""Ji et al., "Show, attend and distill: knowledge distillation via attention-based feature matching", AAAI 2021.

Two methods are called AFD. That of Wang et al. ("Pay attention to features, transfer learn faster CNNs", ICLR
2020) weighs the channels in which a fine-tuned network differs from the one it came from, layer by layer: it needs
two networks of one architecture. This one decides which layers of two unlike networks are compared.
"""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class AfdConfig:
    """The authors' beta of 200, and their width of queries and keys."""

    weight: NonNegativeFloat = 200.0
    width: PositiveInt = 128


def matched(student: Tensor, teacher: Tensor, attention: Tensor) -> Tensor:
    """sum_s attention_s |v_T - v_s|^2, the mean over positions for |.|^2, mean over images.

    student (B, S, N) of S stages, teacher (B, N), both unit vectors of squared activations; attention (B, S).
    """
    distances = (student - teacher[:, None]).square().mean(2)
    return (attention * distances).sum(1).mean()


def energy(maps: Tensor) -> Tensor:
    """Mean of squares over channels: (B, c, h, w) -> (B, 1, h, w)."""
    return maps.square().mean(1, keepdim=True)


class Afd(Term):
    """`afd`: attention of the teacher's features over the student's last four stages weighs their distances.

    The query is a linear map of the teacher's features averaged over positions, a key one of a stage's, with an
    interaction matrix between them and a learnt position of every stage. Queries and keys are trained by the same
    loss. The paper has a query for every stage of the teacher; the feature cache has one level, the last block, so
    there is one. Squared activations of a stage are pooled to the token grid.
    """

    losses = {"afd": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"stages"})

    def __init__(self, config: AfdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        channels, width = sizes.spec.stage_channels, config.width
        self.query = _linear(sizes.space.width, width)
        self.keys = nn.ModuleList(nn.Sequential(_linear(c, width), nn.ReLU()) for c in channels)
        self.interact = _linear(width, width)
        self.position_t = nn.Parameter(nn.init.xavier_normal_(torch.empty(1, width)))
        self.position_s = nn.Parameter(nn.init.xavier_normal_(torch.empty(len(channels), width)))

    def attention(self, stages: list[Tensor], tokens: Tensor) -> Tensor:
        """Softmax over the stages of ((W key) . query + p_T . p_s) / sqrt(width): (B, S)."""
        pairs = zip(self.keys, stages, strict=True)
        keys = torch.stack([key(stage.mean((2, 3))) for key, stage in pairs], dim=1)
        keys = self.interact(keys.flatten(0, 1)).unflatten(0, keys.shape[:2])
        scores = (keys @ self.query(tokens.mean(1))[:, :, None])[:, :, 0]
        scores = scores + self.position_t @ self.position_s.T
        return F.softmax(scores / math.sqrt(self.config.width), dim=1)

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The weighted distances of all stages."""
        stages, tokens = list(outputs.stages), teacher.tokens
        maps = [F.adaptive_avg_pool2d(energy(stage), self.grid).flatten(1) for stage in stages]
        ours = F.normalize(torch.stack(maps, dim=1), dim=2)
        theirs = F.normalize(tokens.square().mean(2), dim=1)
        return {"afd": matched(ours, theirs, self.attention(stages, tokens))}


def _linear(channels: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(channels, width), nn.BatchNorm1d(width))
