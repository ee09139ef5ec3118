"""Settings of the distill stage: the `distill` section of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.distill.methods.cakd import CakdConfig
from pipeline.distill.methods.logits import LogitsConfig
from pipeline.distill.methods.table import Terms, terms_of
from pipeline.training.compute import Compute

PERF_SCHEMA = "cakd.train/1"


@dataclass(frozen=True)
class CrossEntropyConfig:
    """`distill.cross_entropy:` of the labelled images, in every method."""

    weight: float = 1.0  # 0: the teacher's word alone (function matching)
    label_smoothing: float = 0.0

    def __post_init__(self) -> None:
        if self.weight < 0 or not 0 <= self.label_smoothing < 1:
            raise ValueError(
                f"weight, label_smoothing are {self.weight}, {self.label_smoothing}; allowed: 0 or more, 0 to "
                "below 1"
            )


@dataclass(frozen=True)
class Distill:
    """`distill:` which student, by which methods, with one recipe for all of them."""

    methods: tuple[str, ...]
    student: str
    student_kwargs: dict[str, Any] = field(default_factory=dict)  # timm's: output_stride, ...
    steps: int | None = None  # of every method; the budget
    epochs: int | None = (
        None  # the same in passes over all training images; one of the two is given
    )
    batch: int = 64
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: with Nesterov momentum
    momentum: float = 0.9  # of sgd
    lr: float = 2e-3  # peak; linear warm-up over 5 % of the steps, then cosine to 0
    weight_decay: float = 0.05  # not of norms and biases
    clip_norm: float = (
        0.0  # largest gradient norm of the student, and of what is trained beside it; 0: off
    )
    labelled_share: float = 0.5  # of a batch: fresh views for the cross-entropy (decision 17)
    cross_entropy: CrossEntropyConfig = CrossEntropyConfig()
    weights: Literal["fixed", "balanced"] = "fixed"  # balanced: by gradient norms, see `balance`
    balance: float = 0.5  # of every balanced term: its gradient norm over the cross-entropy's
    seed: int = 0
    workers: int = 0  # processes that make the views of coming steps; 0: made when they are needed
    checkpoint_every: int = 200  # steps
    logits: LogitsConfig = LogitsConfig()
    cakd: CakdConfig = CakdConfig()
    terms: Terms = Terms()
    compute: Compute = Compute()
    tuned: dict[str, dict[str, Any]] = field(default_factory=dict)  # method -> dotted key -> value

    def with_choice(self, choice: Mapping[str, Any], method: str) -> Distill:
        """The same with values by dotted key (`logits.weight`).

        Raises UserError: no such key, a value that its settings refuse.
        """
        values = asdict(self)
        for key, value in choice.items():
            *sections, last = key.split(".")
            section = values
            for name in sections:
                section = section.get(name, {})
            if last not in section or isinstance(section[last], dict):
                raise UserError(
                    f"distill.tuned.{method}: got key {key!r}; expected a dotted key of distill, as logits.weight"
                )
            section[last] = value
        return parse(Distill, values, f"distill.tuned.{method}")

    def of_method(self, method: str) -> Distill:
        """The settings of one method: its tuned values in their places."""
        choice = self.tuned.get(method, {})
        return replace(self.with_choice(choice, method), tuned={})

    def of_term(self, name: str) -> Any:
        """The settings of a term, by the name they have here."""
        return {"logits": self.logits, "cakd": self.cakd, **vars(self.terms)}[name]

    def step_count(self, images: int) -> int:
        """Optimiser steps of the whole training, on so many training images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * -(-images // self.batch)

    def __post_init__(self) -> None:
        for method in self.methods:
            terms_of(method)
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"steps, epochs are {self.steps}, {self.epochs}; expected one of them, the other null"
            )
        for name, least in (
            *(("steps", 1), ("epochs", 1), ("batch", 4), ("workers", 0)),
            *(("checkpoint_every", 1), ("clip_norm", 0)),
        ):
            if getattr(self, name) is not None and getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr, weight_decay are {self.lr}, {self.weight_decay}; allowed: lr > 0, decay >= 0"
            )
        if not 0 <= self.labelled_share < 1 or not 0 <= self.momentum < 1:
            raise ValueError(
                f"labelled_share, momentum are {self.labelled_share}, {self.momentum}; allowed: 0 to below 1"
            )
        if self.weights == "balanced" and (not self.cross_entropy.weight or self.balance <= 0):
            raise ValueError(
                f"weights is balanced with cross_entropy.weight {self.cross_entropy.weight} and balance "
                f"{self.balance}; allowed: both above 0"
            )
