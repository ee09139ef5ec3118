"""Heo et al., "A comprehensive overhaul of feature distillation", ICCV 2019."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat
from pydantic.dataclasses import dataclass
from torch import Tensor, nn

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term
from pipeline.distill.projectors import on_grid, tokens_of
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True, config=STRICT)
class OfdConfig:
    """The authors' weights in units of a mean over elements.

    They weigh the sum over the elements of an image: 1e-3 for CIFAR-100 and 1e-4 for ImageNet. Of their last maps,
    256 x 8 x 8 and 2048 x 7 x 7 elements, that is 16 and 10 of the mean.
    """

    weight: NonNegativeFloat = 10.0


def margins(mean: Tensor, std: Tensor) -> Tensor:
    """m_C = E[x | x < 0] of each channel (D,), eq. 3, of x ~ N(mean, std^2).

    mean - std phi(mean / std) / Phi(-mean / std); -3 std where not 1 in 1,000 elements is negative, as in the
    authors' code, which takes mean and deviation from the batch norm before the teacher's ReLU.
    """
    ratio = mean / std
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    negative = torch.special.ndtr(-ratio)
    expected = mean - std * density / negative.clamp(min=1e-3)
    return torch.where(negative > 1e-3, expected, -3 * std)


def partial_l2(student: Tensor, target: Tensor) -> Tensor:
    """d_p of eq. 4, mean over elements: (T - S)^2, but 0 where S <= T <= 0."""
    counted = (student > target) | (target > 0)
    return ((student - target).square() * counted).mean()


class Ofd(Term):
    """`ofd`: d_p(sigma_m(h_T), r(h_S)), eq. 5, with the margin ReLU sigma_m(x) = max(x, m_C) of eq. 2.

    The teacher is read before a ReLU in the paper. No ReLU follows a ViT's last block: h_T, after the final
    LayerNorm, stands for the pre-activation, and the feature cache's channel statistics stand for the batch norm's
    in eq. 3. The student is read at the tap, which timm has behind a ReLU, not before; r, 1x1 convolution + batch
    norm as in the paper, gives both signs. One level instead of all, as the cache has the last block's.
    """

    losses = {"ofd": "weight"}
    teacher = frozenset({"tokens"})
    student = frozenset({"tap"})
    statistics = True
    margin: Tensor

    def __init__(self, config: OfdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.grid = config, sizes.grid
        self.regressor = nn.Sequential(
            nn.Conv2d(sizes.channels, sizes.space.width, 1, bias=False),
            nn.BatchNorm2d(sizes.space.width),
        )
        margin = margins(sizes.space.mean, sizes.space.std)
        self.register_buffer("margin", margin, persistent=False)

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Eq. 5 on the tap, brought to the token grid."""
        assert outputs.feature is not None
        ours = tokens_of(self.regressor(on_grid(outputs.feature, self.grid)))
        return {"ofd": partial_l2(ours, torch.maximum(teacher.tokens, self.margin))}
