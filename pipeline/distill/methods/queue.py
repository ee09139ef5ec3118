"""Similarities to a queue of teacher embeddings, as in LightlyTrain's distillation (Lightly, 2025)."""

from __future__ import annotations

import torch
from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, pooled
from pipeline.models.teacher import TeacherOutputs
from pipeline.training import ranks


@dataclass(frozen=True, config=STRICT)
class QueueConfig:
    """The temperature is theirs."""

    weight: NonNegativeFloat = 1.0
    size: PositiveInt = 8192  # embeddings; no more than there are training images
    temperature: PositiveFloat = 0.07


def queue_divergence(student: Tensor, teacher: Tensor, queue: Tensor, temperature: float) -> Tensor:
    """KL of the teacher's softmax over cosines with the queue to the student's, mean over images.

    student, teacher (B, D), queue (M, D) of unit vectors.
    """

    def similarities(x: Tensor) -> Tensor:
        return F.log_softmax(F.normalize(x, dim=1) @ queue.T / temperature, dim=1)

    return F.kl_div(
        similarities(student), similarities(teacher), reduction="batchmean", log_target=True
    )


class Queue(Term):
    """`queue`: a linear map takes the student's embedding to the teacher's width.

    The queue starts with random directions and takes each batch's teacher embeddings in, the oldest going out.
    """

    losses = {"queue": "weight"}
    teacher = frozenset({"pooled"})
    student = frozenset({"embedding"})
    stored: Tensor
    position: Tensor

    def __init__(self, config: QueueConfig, sizes: Sizes) -> None:
        super().__init__()
        self.config = config
        self.project = nn.Linear(sizes.spec.embedding, sizes.space.width)
        size = min(config.size, len(sizes.labels))
        self.register_buffer("stored", F.normalize(torch.randn(size, sizes.space.width), dim=1))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """The divergence, with the batch's own embeddings not yet in the queue."""
        theirs = pooled(teacher)
        ours = self.project(outputs.embedding)
        loss = queue_divergence(ours, theirs, self.stored.clone(), self.config.temperature)
        if self.training:
            fresh = ranks.of_all_ranks(F.normalize(theirs, dim=1))[-len(self.stored) :]
            slots = (self.position + torch.arange(len(fresh), device=fresh.device)) % len(
                self.stored
            )
            self.stored[slots] = fresh.to(self.stored.dtype)
            self.position += len(fresh)
        return {"queue": loss}
