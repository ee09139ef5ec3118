"""A folder of images as people have them: class folders, a table of labels, or labels in the file names."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePosixPath

from PIL import Image

from pipeline.core.errors import UserError, nearest
from pipeline.data import tree
from pipeline.data.decoding import decode
from pipeline.data.images import SUFFIXES
from pipeline.prepare.sources import tables
from pipeline.prepare.sources.layout import Layout, Level, layout_of, splits_of_images
from pipeline.prepare.sources.sample import (
    Columns,
    FileLabels,
    Sample,
    SourceImages,
    classes_of,
    existing,
    legible,
    shortened,
)
from pipeline.prepare.sources.splits import TRAIN, UNLABELLED, roles, split_of

EXPECTED = "the folder that holds train/ or the class folders, or images and a table of labels"


def read(path: str | None, columns: Columns) -> SourceImages:
    """Class folders, in split folders or not; else a table of labels beside the images; else labels in file names.

    Split folders have any common name (`splits.py:split_of`). Every file below the path is a sample, a table that
    was read, or in `left_out` with its reason.
    Raises UserError: no path, no folder, no class, a class with no image, classes that differ between splits, a
    layout that can be read in two ways, and what `tables.py` raises.
    """
    root = existing("imagefolder", path, EXPECTED)
    if not root.is_dir():
        raise UserError(f"prepare.path: {root}: got a file; expected {EXPECTED}; correct the path")
    left_out, images, others = _files(root)
    sheets = [name for name in others if PurePosixPath(name).suffix.lower() in tables.SUFFIXES]
    if columns.pattern is not None or not sheets:
        columns.only("imagefolder", "pattern")
    labels = _labels(root, images, sheets, columns)
    for name, reason in labels.reasons.items():
        left_out.setdefault(reason, []).append(name)
    for name in others:
        if name not in labels.reasons and name not in labels.tables:
            suffix = PurePosixPath(name).suffix.lower() or legible(PurePosixPath(name).name)
            left_out.setdefault(f"{suffix}, not a format that is read", []).append(name)
    ours = roles(dict.fromkeys(labels.splits[n] for n in labels.labels))
    samples = []
    for name, label in labels.labels.items():
        absent = labels.absent.get(name)
        decoder = partial(_absent, absent) if absent else partial(decode, root / name)
        split = ours[labels.splits[name]] or (TRAIN if label is None else None)
        samples.append(Sample(legible(name), decoder, label, split))
    return SourceImages(labels.classes, samples, labels.notes, left_out)


def _absent(reason: str) -> Image.Image:
    raise ValueError(reason)


def _files(root: Path) -> tuple[dict[str, list[str]], list[str], list[str]]:
    """List the files below the root: system files by reason, images, other files."""
    left_out: dict[str, list[str]] = {}
    images, others = [], []
    for file in sorted(tree.walk(root), key=lambda f: f.name):
        suffix = PurePosixPath(file.name).suffix.lower()
        if file.reason is not None:
            left_out.setdefault(file.reason, []).append(file.name)
        elif suffix in SUFFIXES:
            images.append(file.name)
        elif file.dead and not suffix:
            link = root / file.name
            raise UserError(
                f"{link}: got a link to {link.readlink()}, which is not there; expected a folder or file; "
                "mount it, or remove the link"
            )
        else:
            others.append(file.name)
    return left_out, images, others


def _labels(root: Path, images: list[str], sheets: list[str], columns: Columns) -> FileLabels:
    if columns.pattern is not None:
        return _by_pattern(images, columns.pattern)
    if columns != Columns():
        return tables.read(root, images, sheets, columns)
    layout = layout_of(root, images, bool(sheets))
    if sheets and len(layout.trees[TRAIN].classes()) < 2:
        return tables.read(root, images, sheets, columns)
    labels = _by_folder(root, layout, images)
    tables.check_agreement(root, images, sheets, labels)
    return labels


def _by_pattern(images: list[str], pattern: str) -> FileLabels:
    """Labels from the file names; splits from the folders, where they name any."""
    texts, splits, reasons = {}, {}, {}
    for name, split in splits_of_images(images).items():
        match = re.search(pattern, PurePosixPath(name).name)
        if split == UNLABELLED or (match and match[1]):
            texts[name] = match[1] if match and split != UNLABELLED else ""
            splits[name] = TRAIN if split in (None, UNLABELLED) else str(split)
        else:
            reasons[name] = "a name that prepare.label_pattern does not match"
    if not any(texts.values()):
        raise UserError(
            f"prepare.label_pattern: got {pattern!r}, which matches none of {len(images)} image names "
            f"({shortened(images)}); expected a pattern whose first group is the class; correct it"
        )
    classes, number = classes_of(texts.values(), "prepare.label_pattern")
    return FileLabels(classes, {n: number[t] for n, t in texts.items()}, splits, reasons)


def _by_folder(root: Path, layout: Layout, images: list[str]) -> FileLabels:
    classes = sorted(layout.trees[TRAIN].classes())
    labels: dict[str, int | None] = {}
    splits: dict[str, str] = {}
    for kind, level in layout.trees.items():
        _check_level(root, level, classes)
        for label, folders in sorted(level.classes().items()):
            for name in (name for folder in folders for name in folder.below()):
                labels[name], splits[name] = classes.index(label), kind
    for name in (name for level in layout.unlabelled for name in level.below()):
        labels[name], splits[name] = None, TRAIN
    reasons = {n: _outside(layout, n) for n in images if n not in labels}
    return FileLabels(classes, labels, splits, reasons)


def _check_level(root: Path, level: Level, classes: list[str]) -> None:
    """Raise UserError where the class folders of a split are none, too few, empty, or not those of train."""
    folder = root / level.name
    if not classes:
        raise UserError(
            f"{folder}: got no class folders and {len(level.images)} images; expected 2 class folders or more; "
            "add them, or a table of labels (.csv, .tsv) beside the images, or prepare.label_pattern"
        )
    for name in tree.folders(folder):
        split = split_of(name)
        if name not in level.folders and not (split and split.kind == UNLABELLED):
            raise UserError(
                f"{folder / name}: got a class folder without images; expected {', '.join(sorted(SUFFIXES))}; add "
                "images or remove the folder"
            )
    if len(classes) < 2:
        raise UserError(
            f"{folder}: got 1 class folder ({shortened(classes)}); expected 2 or more; add another"
        )
    unknown = sorted(set(level.classes()) - set(classes))
    if unknown:
        raise UserError(
            f"{folder}: got the class {unknown[0]!r}, which train/ does not have; {nearest(unknown[0], classes)}"
        )


def _outside(layout: Layout, name: str) -> str:
    """The reason why the class folders give an image no label."""
    for level in layout.flat:
        if name.startswith(level.name):
            return f"no label, {level.name} has no class folders"
    below = name.removeprefix(layout.top.name).split("/")
    folder = name.rpartition("/")[0]
    if layout.trees[TRAIN] is not layout.top and len(below) > 1:
        beside = f"{layout.top.name}{below[0]}/"
        if not any(tree.name.startswith(beside) for tree in layout.trees.values()):
            folder = beside.rstrip("/")
    return "outside the class folders" + (f", in {legible(folder)}/" if folder else "")
