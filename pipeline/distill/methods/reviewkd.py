"""Chen et al., "Distilling knowledge via knowledge review", CVPR 2021."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT, Share
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid
from pipeline.models.teacher import TeacherOutputs

MAX_WIDTH = 512  # of the fused features, as in the authors' code
POOLED = (4, 2, 1)  # sides of the pyramid below the whole map


@dataclass(frozen=True, config=STRICT)
class ReviewkdConfig:
    """The authors' for ImageNet; their warm-up for CIFAR-100 is 20 of 240 epochs."""

    weight: NonNegativeFloat = 1.0
    warmup: Share = 0.0833  # share of the steps over which the weight grows from 0


def context_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Hierarchical context loss (HCL, section 3.3) of two maps (B, D, h, w).

    The squared distance of the maps and of their averages on 4x4, 2x2 and 1x1 positions, each mean over elements,
    with weights 1, 1/2, 1/4, 1/8 over their sum. A level that is not coarser than the map is left out.
    """
    total, weight, weights = F.mse_loss(student, teacher), 1.0, 1.0
    for side in POOLED:
        if side >= min(student.shape[-2:]):
            continue
        weight /= 2
        ours, theirs = (F.adaptive_avg_pool2d(x, side) for x in (student, teacher))
        total = total + weight * F.mse_loss(ours, theirs)
        weights += weight
    return total / weights


class Fusion(nn.Module):
    """Attention based fusion (ABF, section 3.3) of a stage with what the deeper stages gave, on one grid.

    A 1x1 convolution brings the stage to `width` channels. Of both features together another one computes two maps
    of weights in (0, 1), by which they are summed; a 3x3 convolution takes the sum to the teacher's width.
    """

    def __init__(self, channels: int, width: int, out: int, deepest: bool) -> None:
        super().__init__()
        self.reduce = nn.Sequential(
            nn.Conv2d(channels, width, 1, bias=False), nn.BatchNorm2d(width)
        )
        self.attend = None if deepest else nn.Conv2d(2 * width, 2, 1)
        self.expand = nn.Sequential(
            nn.Conv2d(width, out, 3, padding=1, bias=False), nn.BatchNorm2d(out)
        )

    def forward(self, stage: Tensor, deeper: Tensor | None) -> tuple[Tensor, Tensor]:
        """Stage (B, c, h, w), deeper (B, width, h, w) -> output (B, D, h, w), and `deeper` of the next stage."""
        fused = self.reduce(stage)
        if self.attend is not None and deeper is not None:
            own, other = self.attend(torch.cat((fused, deeper), dim=1)).sigmoid().split(1, dim=1)
            fused = fused * own + deeper * other
        return self.expand(fused), fused


class Reviewkd(Term):
    """`reviewkd`: the student's last four stages, fused from the deepest to the shallowest.

    In the paper the fused stage i is compared with the teacher's stage i. A ViT has one grid at all depths and the
    feature cache has its last block, so every fused stage is compared with h_T; all stages are brought to the
    token grid before they are fused. The pooled embedding, a level of its own in the authors' code for CIFAR-100,
    is not compared.
    """

    losses = {"reviewkd": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"stages"})

    def __init__(self, config: ReviewkdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        channels = sizes.spec.stage_channels
        width = min(MAX_WIDTH, channels[-1])
        self.fusions = nn.ModuleList(
            Fusion(c, width, sizes.space.width, deepest=i == 0)
            for i, c in enumerate(reversed(channels))
        )

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The context loss of every fused stage, summed over stages."""
        theirs = teacher.tokens.mT.unflatten(2, self.grid)
        losses, deeper = [], None
        for fusion, stage in zip(self.fusions, reversed(outputs.stages), strict=True):
            ours, deeper = fusion(on_grid(stage, self.grid), deeper)
            losses.append(context_loss(ours, theirs))
        return {"reviewkd": torch.stack(losses).sum()}
