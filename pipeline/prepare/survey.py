"""A look at somebody's images before anything is prepared: how many, how large, how many with a label."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.prepare.settings import SOURCES
from pipeline.prepare.sources import tables
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
    if path.suffix.lower() in tables.SUFFIXES:
        raise UserError(
            f"{path}: got a table; expected the folder that holds it and the images; pass DATA={path.parent}"
        )
    source = source_of(path)
    found = SOURCES[source](str(path), Columns())
    if not found.samples:
        raise UserError(
            f"{path}: got 0 images; expected 1 or more; correct the path, or fetch it again"
        )
    step = max(1, len(found.samples) // LOOKED_AT)
    looked_at = found.samples[::step]
    sides: list[int] = []
    first_error = ""
    start = time.perf_counter()
    for sample in looked_at:
        try:
            sides.append(min(sample.read().size))
        except (UserError, OSError, ValueError) as error:  # a few are left to prepare.on_error
            first_error = first_error or f"{sample.origin}: {error}"
    reading = (time.perf_counter() - start) / len(looked_at)
    if 2 * len(sides) < len(looked_at):
        raise UserError(
            f"{path}: {len(looked_at) - len(sides)} of {len(looked_at)} images that were opened cannot be read; "
            f"expected images; check the files, first: {first_error}"
        )
    labelled = sum(sample.label is not None for sample in found.samples)
    side = round(statistics.median(sides))
    counts = (len(found.samples), labelled, len(found.classes), side)
    return Survey(source, *counts, reading, found.samples)


def source_of(path: Path) -> str:
    """The value of prepare.source that reads this path: by its files, an image folder where nothing else fits."""
    if path.name.startswith("cifar-") and not path.is_dir():
        return "cifar"
    parquet = path.is_file() or path.suffix == ".parquet" or next(path.rglob("*.parquet"), None)
    return "parquet" if parquet else "imagefolder"
