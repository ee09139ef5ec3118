"""The base class of every term of a method: its inputs from teacher and student, its losses, their weights.

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
        """Build from the JSON-able keys n_heads, width, h_mean, h_std."""
        mean, std = (torch.tensor(described[k], dtype=torch.float32) for k in ("h_mean", "h_std"))
        return cls(described["n_heads"], described["width"], mean, std)

    def described(self) -> dict[str, Any]:
        """Return the JSON-able form that `of` reads."""
        return {
            "n_heads": self.n_heads,
            "width": self.width,
            "h_mean": self.mean.tolist(),
            "h_std": self.std.tolist(),
        }


@dataclass(frozen=True)
class Sizes:
    """Dimensions that a term is built for."""

    classes: int  # K
    spec: StudentSpec  # of the student
    tap: Tap | None  # where h_S is read; None where the method reads none
    grid: tuple[int, int]  # (h, w) of the teacher's tokens
    space: TeacherSpace
    labels: Tensor  # (images,) of the training images, -1 where the student gets none
    views: int  # cached views of each image

    @property
    def channels(self) -> int:
        """Channels c of the tap."""
        assert self.tap is not None
        return self.tap.channels


@dataclass(frozen=True)
class StudentOutputs:
    """The student's outputs of one batch; labels (B,) are -1 for unlabelled images."""

    logits: Tensor  # (B, K)
    embedding: Tensor  # (B, e)
    feature: Tensor | None  # (B, c, h', w') of the tap, on the student's own grid
    stages: Sequence[Tensor]  # the feature maps, where the method reads them
    labels: Tensor
    key: Key
    progress: float  # share of the training done, 0 to 1

    def targets(self, teacher: TeacherOutputs) -> Tensor:
        """Return the label of each image (B,); the teacher's argmax for unlabelled ones."""
        return torch.where(self.labels >= 0, self.labels, teacher.logits.argmax(1))


class Term(nn.Module):
    """One term of a method, with the modules that it trains beside the student and drops at the end.

    `losses` maps each loss to the setting of its weight; a setting `warmup` ramps all of them linearly over that
    share of the training (decision 10). `teacher` lists its inputs from the teacher: logits, pooled, tokens, qkv;
    `student` those from the student beside its logits: embedding, tap, stages. `beside` names the losses that
    train the term's own modules alone and have no gradient on the student; `statistics` says whether the term uses
    the channel statistics of h_T, which a feature cache has for the teacher's last layer only.
    """

    losses: ClassVar[Mapping[str, str]] = {}
    beside: ClassVar[frozenset[str]] = frozenset()
    statistics: ClassVar[bool] = False
    teacher: ClassVar[frozenset[str]] = frozenset({"logits"})
    student: ClassVar[frozenset[str]] = frozenset()
    config: Any

    def forward(self, outputs: StudentOutputs, teacher: TeacherOutputs) -> dict[str, Tensor]:
        """Return the unweighted losses by their names in the logs."""
        raise NotImplementedError

    def weights(self) -> dict[str, float]:
        """Return the weight of each loss, before `warmth`."""
        return {loss: getattr(self.config, name) for loss, name in self.losses.items()}

    def warmth(self, progress: float) -> float:
        """Return the factor of the term's weights at this share of the training."""
        return ramp(progress, getattr(self.config, "warmup", 0.0))


def pooled(teacher: TeacherOutputs) -> Tensor:
    """Return the teacher's embedding (B, D), the input of its head."""
    assert teacher.pooled is not None  # `check_stored` has refused a store without it
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
    """Grow linearly from 0 to 1 over the first `share` of the training."""
    return min(1.0, progress / share) if share else 1.0
