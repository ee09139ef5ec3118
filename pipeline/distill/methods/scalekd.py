"""Fan et al., "ScaleKD: strong vision transformers could be excellent teachers", NeurIPS 2024, reduced."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid, tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class ScalekdConfig:
    """The authors' weights for ImageNet, 0.08 and 0.06 of a sum over 14 x 14 tokens, as weights of their mean."""

    weight: NonNegativeFloat = 16.0  # of the tokens as they are
    frequency_weight: NonNegativeFloat = 12.0  # of the tokens without their direct component


def without_direct(tokens: Tensor) -> Tensor:
    """Tokens (B, N, D) without the direct component of their discrete cosine transform over the grid.

    The component is the mean over positions times a constant, so to set it to 0 and transform back is to subtract
    the mean.
    """
    return tokens - tokens.mean(1, keepdim=True)


def mimicry(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of the unit vectors of every token, (B, N, D) both, mean over tokens."""
    return (F.normalize(student, dim=2) - F.normalize(teacher, dim=2)).square().sum(2).mean()


class CrossAttention(nn.Module):
    """The cross attention projector: trainable queries, one per token, read the student's map.

    A 3x3 convolution with batch norm and ReLU and a learnt position give keys and values; attention, a norm and an
    MLP follow, as in a block of the teacher. (B, c, h, w) on the token grid -> (B, N, D).
    """

    def __init__(self, channels: int, width: int, tokens: int) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.position = nn.Parameter(nn.init.trunc_normal_(torch.empty(tokens, width), std=0.02))
        self.queries = nn.Parameter(torch.randn(tokens, width))
        heads = math.gcd(width, max(1, width // 128))  # 128 channels a head where they divide
        self.attend = nn.MultiheadAttention(width, heads, batch_first=True)
        self.norm = nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.ReLU(), nn.Linear(4 * width, width)
        )

    def forward(self, feature: Tensor) -> Tensor:
        """Read the map by the queries."""
        read = tokens_of(self.reduce(feature)) + self.position
        queries = self.queries.expand(len(feature), -1, -1)
        x: Tensor = self.norm(self.attend(queries, read, read, need_weights=False)[0])
        out: Tensor = x + self.mlp(x)
        return out


class Scalekd(Term):
    """`scalekd` and `scalekd_frequency`: two views of h_T, each through a projector of its own.

    Two of the paper's three parts: the cross attention projector (section 3.1) and dual-view feature mimicking
    (section 3.2). The third, which runs the teacher's later blocks on the student's features, has nothing to run:
    h_T is the last block's. Queries are trained directly, without a convolution on them, and scores are not
    sharpened. One level instead of two.
    """

    losses = {"scalekd": "weight", "scalekd_frequency": "frequency_weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})

    def __init__(self, config: ScalekdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        shape = sizes.channels, sizes.space.width, math.prod(sizes.grid)
        self.whole, self.alternating = CrossAttention(*shape), CrossAttention(*shape)

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Both distances on the tap, brought to the token grid."""
        assert outputs.feature is not None
        feature, theirs = on_grid(outputs.feature, self.grid), teacher.tokens
        ours = without_direct(self.alternating(feature))
        return {
            "scalekd": mimicry(self.whole(feature), theirs),
            "scalekd_frequency": mimicry(ours, without_direct(theirs)),
        }
