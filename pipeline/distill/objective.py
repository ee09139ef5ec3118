"""The objective of one method: every term on one batch, and what the terms train beside the student."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distill import robust
from pipeline.distill.balance import Balance
from pipeline.distill.methods.cakd import CakdConfig, Gl, Pca
from pipeline.distill.methods.table import TERMS, WITHOUT_LOSS, terms_of
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, ramp
from pipeline.distill.robust import Discriminator
from pipeline.distill.settings import Distill
from pipeline.models.teacher import TeacherOutputs
from pipeline.training.stopwatch import Stopwatch

PROJECTORS = ("pca", "gl")


@dataclass(frozen=True)
class Targets:
    """Labels of a batch for the cross-entropy."""

    labels: Tensor  # (B,), -1 for none
    partner_labels: Tensor  # (B,) of the images that the views are mixed with
    shares: Tensor  # (B,) of an image's own label
    mixed: bool  # whether any share is below 1
    labelled: float  # labelled images that a part of the step's batch has on average


def cross_entropy(logits: Tensor, targets: Targets, smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of the labelled images with their mixed labels, summed, over `targets.labelled`.

    So the mean over the parts of a batch is the mean over the batch, however the labels fell. logits (B, K). Zero,
    with a gradient of zero, where none is labelled.
    """

    def of(labels: Tensor) -> Tensor:
        return F.cross_entropy(
            logits, labels, ignore_index=-1, reduction="none", label_smoothing=smoothing
        )

    each = of(targets.labels)
    if targets.mixed:
        each = targets.shares * each + (1 - targets.shares) * of(targets.partner_labels)
    total = each.sum()
    return total / targets.labelled if targets.labelled else total


@dataclass(frozen=True)
class Losses:
    """Unweighted losses of a batch by name; for a discriminator h_T and h'_S (B, N, D), `real` and `fake`."""

    terms: dict[str, Tensor]
    real: Tensor | None = None
    fake: Tensor | None = None


class Objective(nn.Module):
    """The terms of one method with what they train, dropped at the end. `sizes` None: no term, labels alone."""

    def __init__(self, method: str, config: Distill, sizes: Sizes | None) -> None:
        super().__init__()
        self.terms = terms_of(method)
        self.loss_terms = nn.ModuleDict()
        self.cakd: CakdConfig = config.cakd
        self.labels = config.cross_entropy
        self.discriminator: nn.Module | None = None
        self.balance: Balance | None = None
        if sizes is None:
            return
        for term in self.terms:
            if term not in WITHOUT_LOSS:
                kind, name = TERMS[term]
                self.loss_terms[term] = kind(config.of_term(name), sizes)
        if "adversarial" in self.terms:
            self.discriminator = Discriminator(sizes.space.width)
        if config.weights == "balanced":
            self.balance = Balance(list(self._fixed(1.0))[1:], config.balance)

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each loss at this share of the training."""
        fixed = self._fixed(progress)
        if self.balance is None:
            return fixed
        warm = self._warmth(progress)
        return fixed | {name: warm[name] * w for name, w in self.balance.weights().items()}

    def _fixed(self, progress: float) -> dict[str, float]:
        weights = {"cross_entropy": self.labels.weight}
        for term in self.loss_terms.values():
            weights |= term.weights(progress)  # type: ignore[operator]
        if self.discriminator is not None:
            grown = ramp(progress, self.cakd.warmup)
            weights["adversarial"] = grown * self.cakd.adversarial_weight
        return weights

    def _warmth(self, progress: float) -> dict[str, float]:
        """How much of its weight each term has at this share of the training."""
        shares: dict[str, float] = {}
        for term in self.loss_terms.values():
            assert isinstance(term, Term)
            shares |= dict.fromkeys(term.losses, term.warmth(progress))
        return shares | {"adversarial": ramp(progress, self.cakd.warmup)}

    def forward(
        self,
        logits: Tensor,
        targets: Targets,
        outputs: StudentOutputs | None,
        teacher: TeacherOutputs | None,
        timer: Stopwatch,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Losses:
        """Every loss of a batch: logits (B, K) of all its views; outputs of student and teacher for the cached.

        Only the projectors, whose losses are kept in float32 by their operators, run under `autocast`: elsewhere
        differences of near embeddings would drown in its rounding.
        """
        terms = {
            "cross_entropy": cross_entropy(logits.float(), targets, self.labels.label_smoothing)
        }
        if teacher is None or outputs is None:
            return Losses(terms)
        for name, term in self.loss_terms.items():
            if name in PROJECTORS:
                with timer.stage("projector"), autocast():
                    terms |= term(outputs, teacher)
            else:
                with timer.stage("terms"):
                    terms |= term(outputs, teacher)
        if self.discriminator is None:
            return Losses(terms)
        gl = self.loss_terms["gl"]
        assert isinstance(gl, Gl) and gl.fake is not None
        with timer.stage("adversarial"):
            terms["adversarial"] = robust.adversarial(
                self.discriminator, gl.fake.float(), self.cakd.adversarial
            )
        return Losses(terms, gl.target(teacher.h), gl.fake.detach().float())

    def trained(self) -> list[nn.Parameter]:
        """What is trained together with the student: everything but the discriminator."""
        return list(self.loss_terms.parameters())

    def projectors(self) -> dict[str, Tensor] | None:
        """The state of both projectors, as `cakd.Projectors` reads it; None where the method has not both."""
        pca, gl = (dict(self.loss_terms.items()).get(name) for name in PROJECTORS)
        if not isinstance(pca, Pca) or not isinstance(gl, Gl):
            return None
        both = nn.ModuleDict({"pca": pca.project, "gl": gl.project})
        return {k: v.detach().cpu().contiguous() for k, v in both.state_dict().items()}
