"""Subjects of a latency run: each model in each target that reads its file, at each thread count and batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, PositiveFloat, PositiveInt, field_validator
from pydantic.dataclasses import dataclass

from exporters.artifact.session import TARGETS, Target
from exporters.bench.measure import Subject
from exporters.open import RUNTIMES
from pipeline.core import artifacts
from pipeline.core.config import STRICT
from pipeline.core.errors import UserError, nearest
from pipeline.core.machine import machine

SCHEMA = "cakd.bench/2"
Counts = Annotated[tuple[PositiveInt, ...], Field(min_length=1)]


@dataclass(frozen=True, config=STRICT)
class Bench:
    """`bench:` the measured targets, and how long each is measured."""

    # of exporters.artifact.session.TARGETS, one report file each
    enabled: tuple[Annotated[str, Field(json_schema_extra={"enum": list(TARGETS)})], ...]
    threads: Counts = (1,)  # a row each
    batches: Counts = (1,)  # images a call, a row each
    rounds: PositiveInt = 20  # blocks a row, interleaved with those of the other rows
    seconds_per_row: PositiveFloat = 3.0  # in all blocks of a row, warm-up not counted

    @field_validator("enabled")
    @classmethod
    def _check_enabled(cls, enabled: tuple[str, ...]) -> tuple[str, ...]:
        for name in enabled:
            if name not in TARGETS:
                raise ValueError(f"got {name!r}; {nearest(name, TARGETS)}")
        return enabled


def subjects_of(
    models: Sequence[Path],
    names: Sequence[str] | None,
    threads: Sequence[int],
    batches: Sequence[int | None] = (None,),
) -> list[Subject]:
    """Every model in every target that reads its kind of file, at every thread count and batch.

    Raises UserError: no such file, unknown target, a model that none of the targets reads.
    """
    subjects = []
    for model in models:
        if not model.is_file():
            raise UserError(f"{model}: no such file; expected .onnx, .xml, .safetensors or .plan")
        targets = [t for t in map(_target, names or [default_target(model)]) if t.reads(model)]
        if not targets:
            got = ", ".join(names or [])
            raise UserError(f"{model}: got targets {got}; none reads it; {_readers(model)}")
        subjects += [
            Subject(model.name, model, target, count, batch=batch)
            for target, count, batch in itertools.product(targets, threads, batches)
        ]
    return subjects


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"--targets: got {name!r}; {nearest(name, TARGETS)}")
    return TARGETS[name]


def default_target(artefact: Path) -> str:
    """The target of a file given without one. Raises UserError: a suffix that no or several targets read."""
    precision = "int8" if artefact.stem.endswith("-int8") else "fp32"
    readers = [
        t for t in TARGETS.values() if t.reads(artefact) and not RUNTIMES[t.runtime].needs_gpu
    ]
    if not readers:
        suffix = artefact.suffix
        raise UserError(f"{artefact}: got suffix {suffix!r} and no target; {_readers(artefact)}")
    return min(readers, key=lambda target: target.precision != precision).name


def _readers(artefact: Path) -> str:
    readers = [name for name, target in TARGETS.items() if target.reads(artefact)]
    return f"pass --targets, of {', '.join(readers)}" if readers else "no target reads this suffix"


def bench_document(
    target: str, params: Any, inputs: dict[str, Path], **content: Any
) -> dict[str, Any]:
    """A bench JSON: `content` (rows, and the verdict of a comparison) with its machine and provenance."""
    return {
        "schema": SCHEMA,
        "target": target,
        **content,
        "machine": machine(),
        "provenance": artifacts.provenance(params, **inputs),
    }
