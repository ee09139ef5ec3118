"""A look at somebody's images before anything is prepared: how many, how large, how many with a label."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.prepare.settings import SOURCES
from pipeline.prepare.sources.sample import Columns, Sample

LOOKED_AT = 64  # images that are opened, evenly spaced


@dataclass(frozen=True)
class Survey:
    """What a folder or file of images holds."""

    source: str  # a value of prepare.source
    images: int
    labelled: int
    classes: int
    side: int  # median of the shorter sides, pixels
    reading: float  # seconds that reading one took
    samples: Sequence[Sample] = field(repr=False)


def survey(path: Path) -> Survey:
    """Look at the images of a path, by the readers of `prepare`. Raises UserError: as these; no readable image."""
    source = source_of(path)
    found = SOURCES[source](str(path), Columns())
    step = max(1, len(found.samples) // LOOKED_AT)
    looked_at = found.samples[::step]
    sides = []
    start = time.perf_counter()
    for sample in looked_at:
        try:
            sides.append(min(sample.read().size))
        except (UserError, OSError, ValueError):
            continue  # prepare names it, and stops or leaves it out as prepare.on_error says
    reading = (time.perf_counter() - start) / len(looked_at)
    if not sides:
        raise UserError(
            f"{path}: none of {len(looked_at)} images can be read; expected images; check the files"
        )
    labelled = sum(sample.label is not None for sample in found.samples)
    side = round(statistics.median(sides))
    counts = (len(found.samples), labelled, len(found.classes), side)
    return Survey(source, *counts, reading, found.samples)


def source_of(path: Path) -> str:
    """The value of prepare.source that reads this path: by its files, an image folder where nothing else fits."""
    if path.is_dir() and not next(path.rglob("*.parquet"), None):
        return "imagefolder"
    return "cifar" if path.name.startswith("cifar-") else "parquet"
