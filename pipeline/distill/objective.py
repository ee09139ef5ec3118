"""The objective of one method: every term on one batch, and what the terms train beside the student."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distill import robust
from pipeline.distill.methods.cakd import CakdConfig, Gl, Pca
from pipeline.distill.methods.table import TERMS, WITHOUT_LOSS, terms_of
from pipeline.distill.methods.term import Sizes, StudentOutputs, ramp
from pipeline.distill.robust import Discriminator
from pipeline.models.teacher import TeacherOutputs
from pipeline.training.stopwatch import Stopwatch


def cross_entropy(logits: Tensor, labels: Tensor, labelled: float) -> Tensor:
    """Cross-entropy of the labelled images, summed, over `labelled`; logits (B, K), labels (B,), -1 for none.

    `labelled` is the labelled images a part of the step's batch has on average, so that the mean over the parts is
    the mean over the batch, however the labels fell. Zero, with a gradient of zero, where none is labelled.
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / labelled if labelled else total


PROJECTORS = ("pca", "gl")


@dataclass(frozen=True)
class Losses:
    """Unweighted losses of a batch by name; for a discriminator h_T and h'_S (B, N, D), `real` and `fake`."""

    terms: dict[str, Tensor]
    real: Tensor | None = None
    fake: Tensor | None = None


class Objective(nn.Module):
    """The terms of one method with what they train, dropped at the end. `sizes` None: a plain method."""

    def __init__(self, method: str, settings: Mapping[str, Any], sizes: Sizes | None) -> None:
        super().__init__()
        self.terms = terms_of(method)
        self.parts = nn.ModuleDict()
        self.cakd: CakdConfig = settings["cakd"]
        self.discriminator: nn.Module | None = None
        if sizes is None:
            return
        for term in self.terms:
            if term not in WITHOUT_LOSS:
                kind, name = TERMS[term]
                self.parts[term] = kind(settings[name], sizes)
        if "adversarial" in self.terms:
            self.discriminator = Discriminator(sizes.space.width)

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each loss at this share of the training."""
        found = {"cross_entropy": 1.0}
        for part in self.parts.values():
            found |= part.weights(progress)  # type: ignore[operator]
        if self.discriminator is not None:
            found["adversarial"] = ramp(progress, self.cakd.warmup) * self.cakd.adversarial_weight
        return found

    def forward(
        self,
        seen: StudentOutputs,
        taught: TeacherOutputs | None,
        labelled: float,
        timer: Stopwatch,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Losses:
        """Every loss of a batch. `labelled` is what the cross-entropy is divided by (`cross_entropy`).

        Only the projectors, whose losses are kept in float32 by their operators, run under `autocast`: elsewhere
        differences of near embeddings would drown in its rounding.
        """
        terms = {"cross_entropy": cross_entropy(seen.logits, seen.labels, labelled)}
        if taught is None:
            return Losses(terms)
        for name, part in self.parts.items():
            if name in PROJECTORS:
                with timer.stage("projector"), autocast():
                    terms |= part(seen, taught)
            else:
                with timer.stage("terms"):
                    terms |= part(seen, taught)
        if self.discriminator is None:
            return Losses(terms)
        gl = self.parts["gl"]
        assert isinstance(gl, Gl) and gl.fake is not None
        with timer.stage("adversarial"):
            terms["adversarial"] = robust.adversarial(
                self.discriminator, gl.fake.float(), self.cakd.adversarial
            )
        return Losses(terms, gl.target(taught.h), gl.fake.detach().float())

    def trained(self) -> list[nn.Parameter]:
        """What is trained together with the student: everything but the discriminator."""
        return list(self.parts.parameters())

    def projectors(self) -> dict[str, Tensor] | None:
        """The state of both projectors, as `cakd.Projectors` reads it; None where the method has not both."""
        pca, gl = (dict(self.parts.items()).get(name) for name in PROJECTORS)
        if not isinstance(pca, Pca) or not isinstance(gl, Gl):
            return None
        both = nn.ModuleDict({"pca": pca.project, "gl": gl.project})
        return {k: v.detach().cpu().contiguous() for k, v in both.state_dict().items()}
