"""Images of a source -> a prepared folder: decoded, ordered by their pixels, split, with the student's labels."""

from __future__ import annotations

import errno
import hashlib
import os
import re
from collections.abc import Sequence
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import Field, PositiveInt, field_validator
from pydantic.dataclasses import dataclass

from pipeline.core import artifacts
from pipeline.core.atomic import atomic_dir
from pipeline.core.config import STRICT, Seed
from pipeline.core.errors import UserError, nearest
from pipeline.data.images import BrokenImage, square_pixels
from pipeline.data.prepared import MAX_SIDE, SCHEMA, SOURCE_SCHEMA, SPLITS, UNLABELLED
from pipeline.prepare.sources import cifar, digits, imagefolder, parquet, zoo
from pipeline.prepare.sources.sample import (
    Columns,
    Sample,
    Source,
    SourceImages,
    expanded,
    legible,
    shortened,
)

SOURCES: dict[str, Source] = {
    "digits": digits.read,
    "imagefolder": imagefolder.read,
    "parquet": parquet.read,
    "cifar": cifar.read,
}
# a share of the images, or a count
SplitSize = Annotated[float, Field(gt=0, lt=1)] | Annotated[float, Field(ge=1, multiple_of=1)]


@dataclass(frozen=True, config=STRICT)
class Prepare:
    """`prepare:` which images, at what size, and how many labels the student may see."""

    # digits | imagefolder | parquet | cifar | torchvision:<Name>
    source: str = Field(json_schema_extra={"pattern": f"^({'|'.join(SOURCES)}|{zoo.PREFIX}.+)$"})
    path: str | None = None  # a folder, file or pattern, as the source says
    label_column: str | None = None  # of a table, parquet or cifar, where there are several
    image_column: str | None = None  # of a table or parquet, where there are several
    # of imagefolder: its first group is the class in a file's name
    label_pattern: str | None = None
    image_size: int = Field(default=224, ge=8, le=MAX_SIDE)  # pixels, square
    student_labels: Literal["all"] | PositiveInt = "all"  # "all", or N labels a class
    val: SplitSize = 0.1  # images held out for gates and calibration
    test: SplitSize = 0.2  # the same for the test split, where the source brings none
    on_error: Literal["stop", "skip"] = "stop"  # an unreadable image: stop, or list it and go on
    seed: Seed = 0

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        if source not in SOURCES and not source.startswith(zoo.PREFIX):
            known = [*SOURCES, f"{zoo.PREFIX}<Name>"]
            raise ValueError(f"got {source!r}; {nearest(source, known)}")
        return source

    @field_validator("label_pattern")
    @classmethod
    def _check_label_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and _groups(pattern) < 1:
            raise ValueError(
                f"got {pattern!r}; expected a regular expression with a group, '([a-z]+)_'"
            )
        return pattern


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0


@dataclass(frozen=True)
class Decoded:
    """The images that were read, in the order of their pixels' SHA-256."""

    samples: list[Sample]
    digests: list[str]
    skipped: list[dict[str, str]]  # `origin` and `reason` of the images that were not
    animated: list[str]  # origins of files with several frames


def prepare(config: Prepare, out: Path) -> dict[str, Any]:
    """Read a source, split it, write the prepared folder atomically.

    Returns the index without its records, and `notes` and `left_out` of `source.json`. Records are sorted by the
    SHA-256 of their pixels: the same images and labels give the same folder, byte for byte, from an image folder,
    parquet files or an archive (but for `source.json`).

    Raises UserError: everything a source raises, a broken image (unless `on_error: skip`), a split larger than
    the data, too few labels a class, disk full.
    """
    source = _read_source(config)
    with atomic_dir(out) as folder:
        decoded = _decode(source, config, folder / "images.npy")
        splits = _assign_splits(decoded.samples, config)
        labels_shown = _choose_student_labels(decoded.samples, splits, source.classes, config)
        records = [
            {
                "sha256": decoded.digests[row],
                "label": UNLABELLED if sample.label is None else sample.label,
                "split": splits[row],
                "student_label": row in labels_shown,
            }
            for row, sample in enumerate(decoded.samples)
        ]
        header = {
            "schema": SCHEMA,
            "classes": source.classes,
            "image_size": config.image_size,
            "counts": {s: sum(r["split"] == s for r in records) for s in SPLITS},
            "student_labels": len(labels_shown),
            "labelled_train": sum(
                r["split"] == "train" and r["label"] != UNLABELLED for r in records
            ),
            "images_sha256": artifacts.sha256(folder / "images.npy"),
            "skipped": decoded.skipped,
            "duplicates": duplicates(records),
        }
        artifacts.write_json(folder / "index.json", {**header, "records": records})
        notes = [*source.notes]
        if decoded.animated:
            notes.append(
                f"several frames or pages, of which the first is read: {len(decoded.animated)} files "
                f"({shortened(decoded.animated, 3)})"
            )
        reading = {"notes": notes, "left_out": source.left_out}
        origins = {
            "schema": SOURCE_SCHEMA,
            "source": config.source,
            **reading,
            "origins": [sample.origin for sample in decoded.samples],
            "provenance": artifacts.provenance(config.__dict__),
        }
        artifacts.write_json(folder / "source.json", origins)
    return {**header, **reading}


def _read_source(config: Prepare) -> SourceImages:
    """Read the source and check its class names, labels and splits."""
    columns = Columns(config.label_column, config.image_column, config.label_pattern)
    path = expanded(config.path)
    if config.source in SOURCES:
        source = SOURCES[config.source](path, columns)
    else:
        source = zoo.read(config.source.removeprefix(zoo.PREFIX), path, columns)
    for name in source.classes:
        if legible(name) != name:
            raise UserError(
                f"prepare.path: {config.path}: got the class {name!r}; expected a name without line breaks and "
                "control characters; rename it"
            )
    if len(source.classes) < 2:
        raise UserError(
            f"prepare.path: {config.path}: got {len(source.classes)} classes "
            f"({', '.join(source.classes) or 'none'}); expected 2 or more; correct the path or add images"
        )
    for sample in source.samples:
        if sample.label is None and sample.split in ("val", "test"):
            raise UserError(
                f"prepare.path: {config.path}: {sample.origin}: got no label in {sample.split}; expected labels "
                "in val and test; leave that split out, and test is cut from train"
            )
    return source


def _decode(source: SourceImages, config: Prepare, path: Path) -> Decoded:
    """Decode every image into `path`, (N, S, S, 3) uint8."""
    shape = (len(source.samples), config.image_size, config.image_size, 3)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    _reserve(path)
    rows: list[tuple[str, str, int, Sample]] = []
    skipped, animated = [], list[str]()
    for sample in source.samples:
        row = len(rows)
        try:
            images[row] = square_pixels(
                partial(_noting_frames, sample, animated), sample.origin, config.image_size
            )
        except BrokenImage as error:
            if config.on_error == "stop":
                raise _with_path(error, config) from None
            skipped.append({"origin": error.origin, "reason": error.reason})
            continue
        digest = hashlib.sha256(images[row].tobytes()).hexdigest()
        rows.append((digest, f"{sample.split} {sample.label}", row, sample))
    order = sorted(range(len(rows)), key=lambda i: rows[i][:3])
    _reorder(images, order)
    images.flush()
    if skipped:
        _shorten(path, images[: len(rows)])
    return Decoded([rows[i][3] for i in order], [rows[i][0] for i in order], skipped, animated)


def _noting_frames(sample: Sample, animated: list[str]) -> Image.Image:
    image = sample.read()
    if image.info.get("frames") == "several":
        animated.append(sample.origin)
    return image


def _with_path(error: BrokenImage, config: Prepare) -> BrokenImage:
    """Return the error with the full path of a file below `prepare.path`."""
    path = Path(expanded(config.path) or "") / error.origin
    origin = str(path) if os.path.lexists(path) else error.origin
    return BrokenImage(origin, error.reason, "repair or remove it, or set prepare.on_error: skip")


def _reserve(path: Path) -> None:
    """Reserve the disk space: a memory map on a full disk kills the process. Raises UserError: full."""
    try:
        with path.open("rb+") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return  # a file system that cannot reserve
        raise UserError(
            f"{path.parent}: disk space: got {error.strerror}; expected {path.stat().st_size / 1e9:.2f} GB for "
            "the prepared images; free space, or lower prepare.image_size"
        ) from None


def _reorder(images: NDArray[np.uint8], order: Sequence[int]) -> None:
    """images[i] = images[order[i]] for every i, in place, one image in memory: cycle by cycle."""
    done = np.zeros(len(order), dtype=bool)
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        first, at = images[start].copy(), start
        while order[at] != start:
            images[at] = images[order[at]]
            done[at] = True
            at = order[at]
        images[at] = first
        done[at] = True


def _shorten(path: Path, images: NDArray[np.uint8]) -> None:
    """Write the file anew with the images that were read."""
    shorter = path.with_suffix(".shorter.npy")
    np.save(shorter, images)
    shorter.replace(path)


def duplicates(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """List identical pixels in more than one split (a leak into the test), or under more than one label.

    Compared after resizing, so two files that differ only in details lost by it count as one.
    """
    groups = []
    for digest, group in groupby(enumerate(records), key=lambda pair: pair[1]["sha256"]):
        rows, same = zip(*group, strict=True)
        splits, labels = {r["split"] for r in same}, {r["label"] for r in same}
        if len(splits) > 1 or len(labels) > 1:
            groups.append(
                {
                    "sha256": digest,
                    "splits": [s for s in SPLITS if s in splits],
                    "labels": sorted(labels),
                    "rows": list(rows),
                }
            )
    return groups


def remarks(index: dict[str, Any]) -> list[str]:
    """Lines on a prepared folder for the user: skipped images, duplicates, and last the count of files."""
    across = sum(len(d["splits"]) > 1 for d in index["duplicates"])
    torn = sum(len(d["labels"]) > 1 for d in index["duplicates"])
    skipped = [f"skipped {s['origin']}: {s['reason']}" for s in index["skipped"]]
    lines = skipped[:5] + [f"... and {len(skipped) - 5} more skipped"] * (len(skipped) > 5)
    if across:
        lines.append(f"images in more than one split (what is tested was seen before): {across}")
    if torn:
        lines.append(f"images under more than one label: {torn}")
    return [*lines, _account(index)]


def _account(index: dict[str, Any]) -> str:
    """One line: how many images were read, how many files were not, and why."""
    reasons = sorted(index["left_out"].items(), key=lambda item: (-len(item[1]), item[0]))
    files = sum(len(names) for _, names in reasons) + len(index["skipped"])
    line = f"read {sum(index['counts'].values())} images; not read: {files} files"
    kinds = [f"{len(names)} {reason} ({shortened(names, 1)})" for reason, names in reasons]
    kinds = [f"{len(index['skipped'])} broken"] * bool(index["skipped"]) + kinds
    more = [f"and {len(kinds) - 8} more kinds, see source.json"] * (len(kinds) > 8)
    return f"{line}: {', '.join(kinds[:8] + more)}" if kinds else line


def _assign_splits(samples: Sequence[Sample], config: Prepare) -> list[str]:
    """Keep the splits a source brings; cut the missing ones from the rest, stratified and seeded."""
    from sklearn.model_selection import train_test_split

    splits = [s.split for s in samples]
    for name, share in (("test", config.test), ("val", config.val)):
        if name in splits:
            continue
        free = [i for i, s in enumerate(splits) if s is None]
        labels = [samples[i].label for i in free]
        size: float | int = share if share < 1 else int(share)
        try:
            _, held_out = train_test_split(
                free, test_size=size, stratify=labels, random_state=config.seed
            )
        except ValueError as error:
            raise UserError(
                f"prepare.{name}: got {size} of {len(free)} images; expected a stratified split ({error}); set "
                "another size, or add images"
            ) from None
        for i in held_out:
            splits[i] = name
    return [s or "train" for s in splits]


def _choose_student_labels(
    samples: Sequence[Sample], splits: Sequence[str], classes: Sequence[str], config: Prepare
) -> set[int]:
    """Select the rows of train whose label the student may use: all labelled ones, or N a class by the seed."""
    selected: set[int] = set()
    for label, name in enumerate(classes):
        rows = [i for i, s in enumerate(samples) if splits[i] == "train" and s.label == label]
        if not rows:
            raise UserError(
                f"prepare: class {name!r}: got no training image with val {config.val:g} and test {config.test:g}"
                "; expected 1 or more; add images, or lower prepare.val and prepare.test"
            )
        if isinstance(config.student_labels, int):
            if len(rows) < config.student_labels:
                raise UserError(
                    f"prepare.student_labels: got {config.student_labels}; expected at most {len(rows)}, the "
                    f"training images of class {name!r}; lower it or use 'all'"
                )
            generator = np.random.default_rng((config.seed, label))
            rows = [int(i) for i in generator.choice(rows, config.student_labels, replace=False)]
        selected.update(rows)
    return selected
