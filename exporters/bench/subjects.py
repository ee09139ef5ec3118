"""What a latency run measures: each model in each target that reads its file, at each thread count and batch."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.artifact.session import TARGETS, Target
from exporters.bench.measure import Subject
from exporters.open import RUNTIMES
from pipeline.core import artifacts
from pipeline.core.errors import UserError, nearest
from pipeline.core.machine import machine

SCHEMA = "cakd.bench/2"


@dataclass(frozen=True)
class Bench:
    """`bench:` which targets are measured, and how long."""

    enabled: tuple[str, ...]  # of exporters.artifact.session.TARGETS, one report file each
    threads: tuple[int, ...] = (1,)  # a row each
    batches: tuple[int, ...] = (1,)  # images a call, a row each
    rounds: int = 20  # blocks a row, interleaved with those of the other rows
    seconds_per_row: float = 3.0  # in all blocks of a row, warm-up not counted
    seed: int = 0  # of the order within the rounds

    def __post_init__(self) -> None:
        for name in self.enabled:
            if name not in TARGETS:
                raise ValueError(f"enabled names {name!r}; {nearest(name, TARGETS)}")
        for name, counts in (("threads", self.threads), ("batches", self.batches)):
            if not counts or min(counts) < 1:
                raise ValueError(f"{name} is {list(counts)}; allowed: a list of counts from 1 on")
        if self.rounds < 1 or self.seconds_per_row <= 0:
            raise ValueError(
                f"rounds is {self.rounds}, seconds_per_row {self.seconds_per_row}; both must be above 0"
            )


def subjects_of(
    models: Sequence[Path],
    names: Sequence[str] | None,
    threads: Sequence[int],
    batches: Sequence[int | None] = (None,),
) -> list[Subject]:
    """Every model in every target that reads its kind of file, at every thread count and batch.

    Raises UserError: no such file, unknown target, a model that none of the targets reads.
    """
    found = []
    for model in models:
        if not model.is_file():
            raise UserError(f"{model}: no such file; give .onnx, .xml, .safetensors or .plan")
        targets = [t for t in map(_target, names or [default_target(model)]) if t.reads(model)]
        if not targets:
            raise UserError(
                f"{model}: none of the targets {', '.join(names or [])} reads it; {_readers(model)}"
            )
        found += [
            Subject(model.name, model, target, count, batch=batch)
            for target, count, batch in itertools.product(targets, threads, batches)
        ]
    return found


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"targets: unknown target {name!r}; {nearest(name, TARGETS)}")
    return TARGETS[name]


def default_target(artefact: Path) -> str:
    """The target of a file that came without one. Raises UserError: a kind of file that does not tell."""
    precision = "int8" if artefact.stem.endswith("-int8") else "fp32"
    found = [t for t in TARGETS.values() if t.reads(artefact) and not RUNTIMES[t.runtime].needs_gpu]
    if not found:
        raise UserError(f"{artefact}: its kind does not name one target; {_readers(artefact)}")
    return min(found, key=lambda target: target.precision != precision).name


def _readers(artefact: Path) -> str:
    readers = [name for name, target in TARGETS.items() if target.reads(artefact)]
    return (
        f"give --targets from: {', '.join(readers)}" if readers else "no target reads such a file"
    )


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
