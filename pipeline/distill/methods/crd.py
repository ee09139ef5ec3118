"""Contrastive representation distillation: Tian et al., ICLR 2020."""

from __future__ import annotations

import math

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT, BelowOne
from pipeline.distill.kernels.philox import Key
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, pooled
from pipeline.models.teacher import TeacherOutputs
from pipeline.training import ranks


@dataclass(frozen=True, config=STRICT)
class CrdConfig:
    """The paper's."""

    weight: NonNegativeFloat = 0.8
    width: PositiveInt = 128  # of the space in which the two are compared
    negatives: PositiveInt = 16384  # an anchor; no more than there are other images
    temperature: PositiveFloat = 0.07
    momentum: BelowOne = 0.5  # of what the memory keeps


def critic(scores: Tensor, log_normaliser: Tensor, log_noise: float) -> Tensor:
    """log h / (1 - h), h the probability that a pair is one image's (eq. 19), of scores g . g / T (B, ...).

    h = exp(score) / Z / (exp(score) / Z + M / images), M negatives: in logarithms, which do not overflow.
    """
    return scores - log_normaliser - log_noise


class Crd(Term):
    """`crd`. Two memories of one vector an image (images, width) stand for the negatives, as in the paper.

    A negative is never the anchor's own image, nor one of its class where both are labelled: the authors' code
    draws from other classes only. The negatives are a function of (seed, step), the same for every part of a step.
    All ranks keep one memory.
    """

    losses = {"crd": "weight"}
    teacher = frozenset({"pooled"})
    student = frozenset({"embedding"})
    memory_s: Tensor
    memory_t: Tensor
    log_normaliser: Tensor
    measured: Tensor
    order: Tensor
    first: Tensor
    count: Tensor

    def __init__(self, config: CrdConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config, self.images, self.views = config, len(sizes.labels), sizes.views
        self._register_excluded(sizes.labels)
        self.embed_s = nn.Linear(sizes.spec.embedding, config.width)
        self.embed_t = nn.Linear(sizes.space.width, config.width)
        for name in ("memory_s", "memory_t"):
            start = F.normalize(torch.randn(self.images, config.width), dim=1)
            self.register_buffer(name, start)
        # log Z of either direction, by the first batch
        self.register_buffer("log_normaliser", torch.zeros(2))
        self.register_buffer("measured", torch.zeros(2, dtype=torch.bool))
        self._known: set[int] = set()  # sides that are measured: the device is read once

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Both directions of the noise contrastive loss, eq. 17 and 18, mean over images."""
        ours = F.normalize(self.embed_s(outputs.embedding), dim=1)
        theirs = F.normalize(self.embed_t(pooled(teacher)), dim=1)
        at = outputs.key.ids // self.views
        others = self._negatives(outputs.key, at)
        loss = self._contrast(0, ours, self.memory_t, at, others)
        loss = loss + self._contrast(1, theirs, self.memory_s, at, others)
        if self.training:
            of_all = ranks.of_all_ranks(at)
            self._remember(self.memory_s, ranks.of_all_ranks(ours.detach()), of_all)
            self._remember(self.memory_t, ranks.of_all_ranks(theirs.detach()), of_all)
        return {"crd": loss}

    def _remember(self, memory: Tensor, fresh: Tensor, at: Tensor) -> None:
        """Move each image's vector towards the mean of its fresh ones: an image may be in a batch by two views."""
        same = (at[:, None] == at[None, :]).to(memory.dtype)
        mean = F.normalize(same @ fresh.to(memory.dtype), dim=1)
        moved = self.config.momentum * memory[at] + (1 - self.config.momentum) * mean
        memory[at] = F.normalize(moved, dim=1)  # views of one image write the same vector

    def _register_excluded(self, labels: Tensor) -> None:
        """Images ordered by label, and for each the range of that order that is no negative of it."""
        order = labels.argsort(stable=True)
        ordered = labels[order].contiguous()
        first = torch.searchsorted(ordered, labels.contiguous())
        count = torch.searchsorted(ordered, labels.contiguous(), right=True) - first
        hidden = labels < 0  # only itself
        first[hidden], count[hidden] = order.argsort()[hidden], 1
        for name, tensor in (("order", order), ("first", first), ("count", count)):
            self.register_buffer(name, tensor, persistent=False)

    def _negatives(self, key: Key, at: Tensor) -> Tensor:
        """Positions (B, M) in the memory for anchors that are images `at` (B,)."""
        draw = torch.Generator().manual_seed((key.seed * 1_000_003 + key.step) % 2**63)
        first, count = self.first[at, None], self.count[at, None]
        allowed = self.images - count  # (B, 1)
        drawn = torch.rand(
            len(at),
            min(self.config.negatives, self.images - 1),
            generator=draw,
            dtype=torch.float64,
        ).to(at.device)
        position = (drawn * allowed).long()
        negatives: Tensor = self.order[position + count * (position >= first)]
        return negatives

    def _contrast(
        self, side: int, anchor: Tensor, memory: Tensor, at: Tensor, others: Tensor
    ) -> Tensor:
        scores = anchor @ memory.T.clone() / self.config.temperature  # cloned: changed below
        positive, negative = scores.gather(1, at[:, None]), scores.gather(1, others)
        if side not in self._known and not self.measured[side]:
            mean = ranks.of_all_ranks(negative.detach().flatten().double()).exp().mean()
            self.log_normaliser[side] = (mean * self.images).log()
            self.measured[side] = True
        self._known.add(side)
        constant = self.log_normaliser[side].clone()
        log_noise = math.log(others.shape[1] / self.images)
        joint = F.logsigmoid(critic(positive, constant, log_noise)).sum()
        apart = F.logsigmoid(-critic(negative, constant, log_noise)).sum()
        return -(joint + apart) / len(anchor)
