"""The objective of one method: its terms on a batch, with the modules that the terms train beside the student."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from pipeline.distill import robust
from pipeline.distill.balance import Balance
from pipeline.distill.methods.cakd import CakdConfig, Gl, Pca
from pipeline.distill.methods.table import TERMS, WITHOUT_LOSS, terms_of
from pipeline.distill.methods.term import Sizes, StudentOutputs, Term, ramp
from pipeline.distill.robust import Discriminator
from pipeline.distill.settings import Distill
from pipeline.models.teacher import TeacherOutputs
from pipeline.training.mixed_loss import mixed_cross_entropy
from pipeline.training.stopwatch import Stopwatch

PROJECTORS = ("pca", "gl")


@dataclass(frozen=True)
class Targets:
    """Labels of a batch for the cross-entropy."""

    labels: Tensor  # (B,), -1 for none
    partner_labels: Tensor  # (B,) of the images that the views are mixed with
    shares: Tensor | None  # (B,) of an image's own label; None where no view is mixed
    labelled: float  # mean number of labelled images in a micro-batch of the step


def cross_entropy(logits: Tensor, targets: Targets, smoothing: float = 0.0) -> Tensor:
    """Summed cross-entropy of the labelled images with their mixed labels, divided by `targets.labelled`.

    The mean over the micro-batches is then the mean over the batch, however the labels are spread. logits (B, K).
    Zero, with a gradient of zero, where no image is labelled.
    """
    each = mixed_cross_entropy(
        logits, targets.labels, targets.partner_labels, targets.shares, smoothing
    )
    total = each.sum()
    return total / targets.labelled if targets.labelled else total


@dataclass(frozen=True)
class Losses:
    """Unweighted losses of a batch by name; `real` and `fake` are h_T and h'_S (B, N, D) for the discriminator."""

    terms: dict[str, Tensor]
    real: Tensor | None = None
    fake: Tensor | None = None

    def of_part(self, share: float) -> Losses:
        """Every mean over the cached views times `share`, so that the mean over the parts is that of the batch."""
        if share == 1:
            return self
        terms = {n: v if n == "cross_entropy" else share * v for n, v in self.terms.items()}
        return replace(self, terms=terms)


class Objective(nn.Module):
    """The terms of one method with their trained modules, dropped at the end; `sizes` None: no terms."""

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
            losses = (n for term in self._loss_terms() for n in term.losses if n not in term.beside)
            judged = ("adversarial",) if self.discriminator is not None else ()
            self.balance = Balance([*losses, *judged], config.balance * config.cross_entropy.weight)

    def compile_terms(self) -> None:
        """Compile every loss term in place, with torch.compile: its name and state stay what they are."""
        for term in self.loss_terms.values():
            term.compile()

    def weights(self, progress: float) -> dict[str, float]:
        """The weight of each loss at this share of the training."""
        weights = {"cross_entropy": self.labels.weight}
        balanced = self.balance.weights() if self.balance is not None else {}
        for term in self._loss_terms():
            grown = term.warmth(progress)
            weights |= {n: grown * balanced.get(n, w) for n, w in term.weights().items()}
        if self.discriminator is not None:
            weight = balanced.get("adversarial", self.cakd.adversarial_weight)
            weights["adversarial"] = ramp(progress, self.cakd.warmup) * weight
        return weights

    @property
    def beside(self) -> frozenset[str]:
        """The losses that have no gradient on the student."""
        return frozenset().union(*(term.beside for term in self._loss_terms()))

    def _loss_terms(self) -> Iterator[Term]:
        for term in self.loss_terms.values():
            assert isinstance(term, Term)
            yield term

    def forward(
        self,
        logits: Tensor,
        targets: Targets,
        outputs: StudentOutputs | None,
        teacher: TeacherOutputs | None,
        timer: Stopwatch,
        autocast: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Losses:
        """Return every loss of a batch: logits (B, K) of all views, outputs of both networks for the cached ones.

        Only the projectors run under `autocast`, as their operators compute the losses in float32; other terms
        take differences of close embeddings, which its rounding would lose.
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
        return Losses(terms, gl.target(teacher.tokens), gl.fake.detach().float())

    def trained(self) -> list[nn.Parameter]:
        """Return the parameters trained together with the student: all but the discriminator's."""
        return list(self.loss_terms.parameters())

    def projectors(self) -> dict[str, Tensor] | None:
        """Return the state of both projectors for `cakd.Projectors`; None where the method has not both."""
        pca, gl = (dict(self.loss_terms.items()).get(name) for name in PROJECTORS)
        if not isinstance(pca, Pca) or not isinstance(gl, Gl):
            return None
        both = nn.ModuleDict({"pca": pca.project, "gl": gl.project})
        return {k: v.detach().cpu().contiguous() for k, v in both.state_dict().items()}
