"""Settings of the distill stage: the `distill` section of params.yaml."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from pipeline.core.config import STRICT, BelowOne, Seed, parse
from pipeline.core.errors import UserError, nearest
from pipeline.core.students import BEST, MAIN
from pipeline.distill.methods.cakd import CakdConfig
from pipeline.distill.methods.logits import LogitsConfig
from pipeline.distill.methods.table import METHODS, Terms, terms_of
from pipeline.training.compute import Compute

PERF_SCHEMA = "cakd.train/1"
NAME = "^[A-Za-z0-9_]{1,40}$"  # of a further student: part of paths and of dotted keys in dvc.yaml
METHOD = "^({0})(\\+({0}))*$".format("|".join(METHODS))  # for params.schema.json


@dataclass(frozen=True, config=STRICT)
class CrossEntropyConfig:
    """`distill.cross_entropy:` of the labelled images, in every method."""

    weight: NonNegativeFloat = 1.0  # 0: no labels, the teacher alone (function matching)
    label_smoothing: BelowOne = 0.0


@dataclass(frozen=True, config=STRICT)
class StudentConfig:
    """`distill.students.NAME:` a further student, trained from the same features by the same methods."""

    student: str  # timm's name
    student_kwargs: dict[str, Any] = Field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Distill:
    """`distill:` which student, by which methods, with one recipe for all of them."""

    # names of pipeline/distill/methods/table.py, or sums of them: cakd+logits
    methods: tuple[Annotated[str, Field(json_schema_extra={"pattern": METHOD})], ...]
    student: str
    student_kwargs: dict[str, Any] = Field(default_factory=dict)  # timm's: output_stride, ...
    # further students by name, of which the best within the budgets is exported (docs/choose.md)
    students: dict[Annotated[str, Field(pattern=NAME)], StudentConfig] = Field(default_factory=dict)
    steps: PositiveInt | None = None  # of every method; the budget
    # the same in passes over all training images; exactly one of the two is set
    epochs: PositiveInt | None = None
    batch: int = Field(default=64, ge=4)
    optimizer: Literal["adamw", "sgd"] = "adamw"  # sgd: with Nesterov momentum
    momentum: BelowOne = 0.9  # of sgd
    lr: PositiveFloat = 2e-3  # peak; linear warm-up over 5 % of the steps, then cosine to 0
    weight_decay: NonNegativeFloat = 0.05  # not of norms and biases (vectors)
    # largest gradient norm of the student, and of what is trained beside it; 0: off
    clip_norm: NonNegativeFloat = 0.0
    labelled_share: BelowOne = 0.5  # of a batch: fresh views for the cross-entropy (decision 17)
    cross_entropy: CrossEntropyConfig = CrossEntropyConfig()
    weights: Literal["fixed", "balanced"] = "fixed"  # balanced: by gradient norms, see `balance`
    # of every balanced term: its gradient norm over the cross-entropy's
    balance: NonNegativeFloat = 0.5
    seed: Seed = 0
    # processes that make the views of coming steps; 0: made when they are needed
    workers: NonNegativeInt = 0
    checkpoint_every: PositiveInt = 200  # steps
    logits: LogitsConfig = LogitsConfig()
    cakd: CakdConfig = CakdConfig()
    terms: Terms = Terms()
    compute: Compute = Compute()
    # method -> dotted key -> value
    tuned: dict[str, dict[str, Any]] = Field(default_factory=dict)

    @field_validator("methods")
    @classmethod
    def _check_methods(cls, methods: tuple[str, ...]) -> tuple[str, ...]:
        for method in methods:
            terms_of(method)
        return methods

    @field_validator("students")
    @classmethod
    def _check_students(cls, students: dict[str, StudentConfig]) -> dict[str, StudentConfig]:
        for name in students:
            if name in (*METHODS, MAIN, BEST):
                raise ValueError(
                    f"got a student named {name!r}, which is the name of a method or means distill.student; "
                    "expected another; rename it"
                )
        return students

    @model_validator(mode="after")
    def _check_budget_and_balance(self) -> Self:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError(
                f"got steps {self.steps} and epochs {self.epochs}; expected one of them; set the other to null"
            )
        if self.weights == "balanced" and not (self.cross_entropy.weight and self.balance):
            raise ValueError(
                f"got weights balanced with cross_entropy.weight {self.cross_entropy.weight} and balance "
                f"{self.balance}; expected both above 0; raise them, or set weights: fixed"
            )
        return self

    def with_choice(self, choice: Mapping[str, Any], method: str) -> Distill:
        """Return a copy with values by dotted key (`logits.weight`).

        Raises UserError: no such key, a value that is not allowed.
        """
        values = asdict(self)
        for key, value in choice.items():
            *sections, last = key.split(".")
            section: Any = values
            for name in sections:
                section = section.get(name) if isinstance(section, dict) else None
            if not isinstance(section, dict) or isinstance(section.get(last, {}), dict):
                raise UserError(
                    f"distill.tuned.{method}: got key {key!r}; expected one of distill, as logits.weight"
                )
            section[last] = value
        return parse(Distill, values, f"distill.tuned.{method}")

    def of_method(self, method: str) -> Distill:
        """Return the settings of one method, with its tuned values."""
        choice = self.tuned.get(method, {})
        return replace(self.with_choice(choice, method), tuned={}, students={})

    def of_student(self, name: str) -> Distill:
        """Return the settings of one student by its name in `students`. Raises UserError: no such student."""
        if name == MAIN:
            return self
        if name not in self.students:
            raise UserError(f"--student: got {name!r}; {nearest(name, (MAIN, *self.students))}")
        return replace(self, **vars(self.students[name]))

    def of_term(self, name: str) -> Any:
        """Return the settings of a term by their name in `distill` or `distill.terms`."""
        return {"logits": self.logits, "cakd": self.cakd, **vars(self.terms)}[name]

    def step_count(self, images: int) -> int:
        """Return the optimiser steps of the training, for this number of training images."""
        if self.steps is not None:
            return self.steps
        assert self.epochs is not None
        return self.epochs * -(-images // self.batch)
