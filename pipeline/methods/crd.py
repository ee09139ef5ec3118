"""Contrastive representation distillation: Tian et al., ICLR 2020."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.kernels.philox import Key
from pipeline.methods.term import Seen, Sizes, Term, pooled
from pipeline.teacher import Tokens


@dataclass(frozen=True)
class CrdConfig:
    """The paper's."""

    weight: float = 0.8
    width: int = 128  # of the space in which the two are compared
    negatives: int = 16384  # an anchor; no more than there are images
    temperature: float = 0.07
    momentum: float = 0.5  # of what the memory keeps

    def __post_init__(self) -> None:
        if self.temperature <= 0 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"temperature, momentum are {self.temperature}, {self.momentum}; allowed: above 0, 0 to below 1"
            )
        for name in ("width", "negatives"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: 1 or more")


def critic(scores: Tensor, normaliser: Tensor, noise: float) -> Tensor:
    """h of eq. 19, in (0, 1): the probability that a pair is one image's, from exp(g . g / T) (B, ...)."""
    chance = scores / normaliser
    return chance / (chance + noise)


class Crd(Term):
    """`crd`. Two memories of one vector an image (images, width) stand for the negatives, as in the paper.

    The negatives are a function of (seed, step). Across ranks each keeps the memory of its own batches.
    """

    teacher = frozenset({"pooled"})
    student = frozenset({"embedding"})
    memory_s: Tensor
    memory_t: Tensor
    normaliser: Tensor

    def __init__(self, config: CrdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.images, self.views = config, sizes.images, sizes.views
        self.embed_s = nn.Linear(sizes.anatomy.embedding, config.width)
        self.embed_t = nn.Linear(sizes.space.width, config.width)
        for name in ("memory_s", "memory_t"):
            start = F.normalize(torch.randn(sizes.images, config.width), dim=1)
            self.register_buffer(name, start)
        self.register_buffer(
            "normaliser", torch.zeros(2)
        )  # of either direction, set by the first batch

    def forward(self, seen: Seen, taught: Tokens) -> dict[str, Tensor]:
        """Both directions of the noise contrastive loss, eq. 17 and 18, mean over images."""
        ours = F.normalize(self.embed_s(seen.embedding), dim=1)
        theirs = F.normalize(self.embed_t(pooled(taught)), dim=1)
        at = seen.key.ids // self.views
        others = self._negatives(seen.key)
        loss = self._contrast(0, ours, self.memory_t, at, others)
        loss = loss + self._contrast(1, theirs, self.memory_s, at, others)
        if self.training:
            self._remember(self.memory_s, ours.detach(), at)
            self._remember(self.memory_t, theirs.detach(), at)
        return {"crd": loss}

    def _remember(self, memory: Tensor, fresh: Tensor, at: Tensor) -> None:
        """Move each image's vector towards the mean of its fresh ones: an image may be in a batch by two views."""
        images, which = at.unique(return_inverse=True)
        total = torch.zeros(len(images), memory.shape[1], device=memory.device, dtype=memory.dtype)
        mean = F.normalize(total.index_add(0, which, fresh.to(memory.dtype)), dim=1)
        kept = self.config.momentum * memory[images] + (1 - self.config.momentum) * mean
        memory[images] = F.normalize(kept, dim=1)

    def _negatives(self, key: Key) -> Tensor:
        """Positions (B, M) in the memory."""
        draw = torch.Generator().manual_seed((key.seed * 1_000_003 + key.step) % 2**63)
        count = min(self.config.negatives, self.images)
        drawn = torch.randint(self.images, (len(key.ids), count), generator=draw)
        return drawn.to(key.ids.device)

    def _contrast(
        self, side: int, anchor: Tensor, memory: Tensor, at: Tensor, others: Tensor
    ) -> Tensor:
        scores = (
            anchor @ memory.T.clone() / self.config.temperature
        ).exp()  # cloned: changed below
        positive, negative = scores.gather(1, at[:, None]), scores.gather(1, others)
        if not self.normaliser[side]:
            self.normaliser[side] = negative.detach().mean() * self.images
        count = others.shape[1]
        noise = count / self.images
        constant = self.normaliser[side].clone()
        joint = critic(positive, constant, noise)
        apart = critic(negative, constant, noise)
        return -(joint.log().sum() + (1 - apart).log().sum()) / len(anchor)

    def weights(self, progress: float) -> dict[str, float]:  # noqa: ARG002
        """Constant."""
        return {"crd": self.config.weight}
