"""A folder of class folders, as torchvision's ImageFolder and most data sets on the web are laid out."""

from __future__ import annotations

from collections import Counter
from functools import partial
from pathlib import Path

from pipeline.core.errors import UserError, nearest
from pipeline.data import tree
from pipeline.data.decoding import decode
from pipeline.data.images import SUFFIXES, image_files
from pipeline.data.prepared import SPLITS
from pipeline.prepare.sources.sample import (
    Sample,
    SourceImages,
    check_label_column,
    existing,
    legible,
    train_and_test,
)

EXPECTED = "the folder that holds train/ or the class folders"


def read(path: str | None, label_column: str | None) -> SourceImages:
    """Class folders under train/ and val/ or test/, or one tree of class folders; `unlabelled/` beside them.

    With train/ and val/ only, val/ is the test split, as the field reports it, and val is cut from train.
    Raises UserError: no path, no folder, no class, a class with no image, classes that differ between splits.
    """
    check_label_column("imagefolder", label_column)
    root = existing("imagefolder", path, EXPECTED)
    if not root.is_dir():
        raise UserError(f"prepare.path: {root} is not a folder; give {EXPECTED}")
    trees = _trees(root)
    labelled = {folder: _class_folders(folder) for folder in trees}
    first = next(iter(trees))
    classes = sorted(labelled[first])
    if len(classes) < 2:
        raise UserError(
            f"{first}: found {len(classes)} class folders ({', '.join(classes) or 'none'}); at least 2 are needed"
        )
    samples: list[Sample] = []
    for folder, split in trees.items():
        unknown = sorted(set(labelled[folder]) - set(classes))
        if unknown:
            raise UserError(
                f"{folder}: class {unknown[0]!r} is not in train/; {nearest(unknown[0], classes)}"
            )
        for name, below in sorted(labelled[folder].items()):
            samples += _of_class(root, below, classes.index(name), split)
    samples += [_sample(root, p, None, "train") for p in image_files(root / "unlabelled")]
    return SourceImages(classes, samples, _left_out(root))


def _trees(root: Path) -> dict[Path, str | None]:
    """The folders that hold class folders, train/ first, each with its split."""
    there = [s for s in SPLITS if (root / s).is_dir()]
    if not there:
        return {root: None}
    if "train" not in there:
        raise UserError(f"{root}: has {'/, '.join(there)}/ but no train/; add train/")
    return {root / name: split for name, split in train_and_test(there).items()}


def _class_folders(tree: Path) -> dict[str, Path]:
    return {
        p.name: p
        for p in tree.iterdir()
        if p.is_dir() and p.name != "unlabelled" and p.name[0] != "."
    }


def _of_class(root: Path, folder: Path, label: int, split: str | None) -> list[Sample]:
    found = image_files(folder)
    if not found:
        raise UserError(
            f"{folder}: class {folder.name!r} holds no image ({', '.join(sorted(SUFFIXES))}); add images or "
            "remove the folder"
        )
    return [_sample(root, p, label, split) for p in found]


def _sample(root: Path, path: Path, label: int | None, split: str | None) -> Sample:
    return Sample(legible(path.relative_to(root).as_posix()), partial(decode, path), label, split)


def _left_out(root: Path) -> list[str]:
    files = (Path(f.name) for f in tree.walk(root) if f.reason is None)
    others = Counter(p.suffix.lower() or p.name for p in files if p.suffix.lower() not in SUFFIXES)
    if not others:
        return []
    told = ", ".join(f"{n} {legible(suffix)}" for suffix, n in others.most_common(5))
    return [f"left out, not a format that is read here: {told}"]
