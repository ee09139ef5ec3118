"""What only the teacher's own training does to its views: TrivialAugment or RandAugment, and random erasing.

By torchvision; a function of (seed, image, view), in any process and batch. The feature cache's views have none.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any, Literal

import torch
from numpy.typing import NDArray
from pydantic import Field
from pydantic.dataclasses import dataclass
from torch import Tensor

from pipeline.core import artifacts
from pipeline.core.config import STRICT, Share

GREY = 128  # of what is erased, or comes in from beyond an edge


@dataclass(frozen=True, config=STRICT)
class Augment:
    """`teach.augment:` beside geometry and mixing."""

    # trivial: TrivialAugmentWide (Müller and Hutter, ICCV 2021); rand: RandAugment (Cubuk et al., NeurIPS 2020)
    policy: Literal["none", "trivial", "rand"] = "none"
    operations: int = Field(default=2, ge=1, le=8)  # of rand: applied one after the other
    magnitude: int = Field(default=9, ge=0, le=30)  # of rand: their strength
    erasing: Share = 0.0  # of the views in which a box is erased (Zhong et al., AAAI 2020)

    @property
    def on(self) -> bool:
        """Whether it changes any view."""
        return self.policy != "none" or self.erasing > 0


class Augmented:
    """An `Augment` with its seed: views (B, 3, S, S) uint8 of (rows, views) to changed ones."""

    def __init__(self, settings: Augment, seed: int) -> None:
        self.settings, self.seed = settings, seed

    @cached_property
    def transforms(self) -> list[Callable[[Tensor], Tensor]]:
        """torchvision's transforms, which draw from torch's generator of the CPU."""
        from torchvision.transforms import InterpolationMode, v2

        settings = self.settings
        bilinear: Any = {"interpolation": InterpolationMode.BILINEAR, "fill": GREY}
        chosen: list[Callable[[Tensor], Tensor]] = []
        if settings.policy == "trivial":
            chosen.append(v2.TrivialAugmentWide(**bilinear))
        if settings.policy == "rand":
            chosen.append(v2.RandAugment(settings.operations, settings.magnitude, **bilinear))
        if settings.erasing:
            chosen.append(v2.RandomErasing(settings.erasing, value=GREY))
        return chosen

    def __call__(self, batch: Tensor, rows: NDArray[Any], views: NDArray[Any]) -> Tensor:
        """Change each view by its own draws."""
        changed = []
        with torch.random.fork_rng(devices=[]):
            for view, row, number in zip(batch, rows.tolist(), views.tolist(), strict=True):
                drawn = artifacts.digest([self.seed, row, number, "augment"])
                torch.default_generator.manual_seed(int(drawn[:15], 16))
                for transform in self.transforms:
                    view = transform(view)
                changed.append(view)
        return torch.stack(changed)
