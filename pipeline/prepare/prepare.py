"""Images of a source -> a prepared folder: decoded, ordered by their pixels, split, with the student's labels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import artifacts
from pipeline.core.atomic import atomic_dir
from pipeline.core.errors import UserError
from pipeline.data.prepared import SCHEMA, SOURCE_SCHEMA, SPLITS, UNLABELLED
from pipeline.prepare.decoded import decode_images
from pipeline.prepare.settings import SOURCES, Prepare
from pipeline.prepare.sources import zoo
from pipeline.prepare.sources.sample import (
    Columns,
    Sample,
    SourceImages,
    expanded,
    legible,
    shortened,
)


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
        decoded = decode_images(source, config, folder)
        splits = assign_splits(decoded.samples, config)
        labels_shown = _choose_student_labels(decoded.samples, splits, source.classes, config)
        records = [
            {
                "sha256": decoded.digests[row],
                "label": UNLABELLED if sample.label is None else sample.label,
                "split": splits[row],
                "student_label": row in labels_shown,
                **({"bytes": decoded.lengths[row]} if decoded.lengths else {}),
            }
            for row, sample in enumerate(decoded.samples)
        ]
        header = {
            "schema": SCHEMA,
            "classes": source.classes,
            "image_size": config.image_size,
            "stored": decoded.stored,
            "crop_mode": decoded.crop_mode,
            "counts": {s: sum(r["split"] == s for r in records) for s in SPLITS},
            "student_labels": len(labels_shown),
            "labelled_train": sum(
                r["split"] == "train" and r["label"] != UNLABELLED for r in records
            ),
            "images_sha256": artifacts.sha256(decoded.path),
            "skipped": decoded.skipped,
            "duplicates": duplicates(records),
        }
        artifacts.write_json(folder / "index.json", {**header, "records": records})
        notes = [*source.notes, *decoded.notes]
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


def assign_splits(samples: Sequence[Sample], config: Prepare) -> list[str]:
    """Keep the splits a source brings; cut the missing ones from the rest, stratified and seeded.

    Returns a split a sample. Raises UserError: a split larger than the data.
    """
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
