"""The Runtime object: the files a runtime reads, and how its artefacts are made and opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pydantic.dataclasses
from pydantic import NonNegativeFloat, PositiveInt

from exporters.artifact import agreement
from exporters.artifact.reference import Exported
from exporters.artifact.session import Session
from pipeline.core.config import STRICT

Calibration = Literal["minmax", "percentile", "entropy"]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Build(agreement.Thresholds):
    """`build:` parity gates, the accuracy int8 may lose, and the batches of an engine."""

    int8_drop: float = 0.01  # top-1 on the reference images, as a fraction
    int8_calibration: Calibration = "minmax"
    # seconds to search for nodes to leave in float, where int8 fails its gates
    int8_search_s: NonNegativeFloat = 60.0
    # smallest, usual and largest batch
    trt_shapes: tuple[PositiveInt, PositiveInt, PositiveInt] = (1, 1, 8)


@dataclass(frozen=True)
class Runtime:
    """A row of `exporters.open.RUNTIMES`; its library is imported by its calls, so a missing one hurts no other.

    make(precision, model, exported, out, settings) writes `student` or `teacher` into the folder `out` and returns
    the artefact's path. open(artefact, threads, precision) returns a session on that many intra-op threads.
    obstacle(artefact) returns why it cannot run here, where that is known without loading it.
    Raises Unavailable: the library or its device is missing; UserError: the runtime rejects the artefact.
    """

    name: str  # as the rows of `exporters.artifact.session.TARGETS` have it
    suffix: str  # of the files it reads
    make: Callable[[str, str, Exported, Path, Build], Path]
    open: Callable[[Path, int, str], Session]
    packages: tuple[str, ...] = ()  # imported before a load is timed: import time is not load time
    needs_gpu: bool = False
    obstacle: Callable[[Path], str | None] = lambda _: None
