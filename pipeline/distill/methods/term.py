"""What every term of a method has in common: what it reads of teacher and student, its losses, their weights.

Shapes: B batch, K classes, c channels of the student's tap, h x w the teacher's token grid, N = h w tokens,
D teacher width, H heads, d = D / H, e width of the student's embedding (the input of its classifier).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pipeline.distill.kernels.philox import Key
from pipeline.models.student import StudentSpec, Tap
from pipeline.models.teacher import TeacherOutputs


@dataclass(frozen=True)
class TeacherSpace:
    """Dimensions of the teacher: H heads, D width, and the channel statistics (D,) of h_T."""

    n_heads: int
    width: int
    mean: Tensor
    std: Tensor

    @classmethod
    def of(cls, described: dict[str, Any]) -> TeacherSpace:
        """From the JSON-able keys n_heads, width, h_mean, h_std."""
        mean, std = (torch.tensor(described[k], dtype=torch.float32) for k in ("h_mean", "h_std"))
        return cls(described["n_heads"], described["width"], mean, std)

    def described(self) -> dict[str, Any]:
        """The JSON-able form that `of` reads."""
        return {
            "n_heads": self.n_heads,
            "width": self.width,
            "h_mean": self.mean.tolist(),
            "h_std": self.std.tolist(),
        }


@dataclass(frozen=True)
class Sizes:
    """What a term is built for."""

    classes: int  # K
    spec: StudentSpec  # of the student
    tap: Tap | None  # where h_S is read; None where the method reads none
    space: TeacherSpace
    labels: Tensor  # (images,) of the training images, -1 where the student is shown none
    views: int  # of each image that the teacher knows

    @property
    def channels(self) -> int:
        """c, of the tap."""
        assert self.tap is not None
        return self.tap.channels

    @property
    def grid(self) -> tuple[int, int]:
        """h, w of the teacher's tokens."""
        assert self.tap is not None
        return self.tap.tokens


@dataclass(frozen=True)
class StudentOutputs:
    """The student's side of one batch. labels (B,) are -1 where no label is shown."""

    logits: Tensor  # (B, K)
    embedding: Tensor  # (B, e)
    feature: Tensor | None  # (B, c, h', w') of the tap, on the student's own grid
    stages: Sequence[Tensor]  # the feature maps, where the method reads them
    labels: Tensor
    key: Key
    progress: float  # share of the training done, 0 to 1

    def targets(self, teacher: TeacherOutputs) -> Tensor:
        """The label of each image (B,); where none is shown, the teacher's answer."""
        return torch.where(self.labels >= 0, self.labels, teacher.logits.argmax(1))


class Term(nn.Module):
    """One named part of a method, with whatever it trains beside the student and drops at the end.

    `losses` names the setting that weighs each loss; a setting `warmup` lets all of them grow linearly over that
    share of the training (decision 10). `teacher` names what it reads of the teacher: logits, pooled, tokens, qkv;
    `student` what of the student beside its logits: embedding, tap, stages.
    """

    losses: ClassVar[Mapping[str, str]] = {}
    teacher: ClassVar[frozenset[str]] = frozenset({"logits"})
    student: ClassVar[frozenset[str]] = frozenset()
    config: Any

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Unweighted losses by the names they have in the logs."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """The weight of each loss, before `warmth`."""
        return {loss: getattr(self.config, name) for loss, name in self.losses.items()}

    def warmth(self, progress: float) -> float:
        """The share of its weight that the term has at this share of the training."""
        return ramp(progress, getattr(self.config, "warmup", 0.0))


def pooled(teacher: TeacherOutputs) -> Tensor:
    """The teacher's embedding (B, D), the input of its head."""
    assert teacher.pooled is not None  # the method was refused where the store cannot give it
    return teacher.pooled


def one_hot(target: Tensor, classes: int) -> Tensor:
    """(B,) -> (B, K) bool; F.one_hot reads the largest label, for which a device would be waited for."""
    return target[:, None] == torch.arange(classes, device=target.device)


def pairwise_distances(x: Tensor) -> Tensor:
    """Euclidean distances (B, B) between embeddings (B, e); 0, with a gradient of 0, between equal ones."""
    squared = (x[None, :, :] - x[:, None, :]).square().sum(2)
    apart = squared > 0
    return torch.where(apart, squared, 1).sqrt() * apart


def ramp(progress: float, share: float) -> float:
    """Linear growth from 0 to 1 over the first `share` of the training."""
    return min(1.0, progress / share) if share else 1.0
