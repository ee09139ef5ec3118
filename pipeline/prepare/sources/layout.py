"""Where the images of a folder lie: split folders under any common name, class folders, images without either."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.core.errors import UserError
from pipeline.data import tree
from pipeline.prepare.sources.sample import composed, shortened
from pipeline.prepare.sources.splits import TRAIN, UNLABELLED, SplitName, split_of, sure_splits


@dataclass
class Level:
    """A folder with images at any depth. Names count from the root and end in `/`, the root's is empty."""

    name: str = ""
    images: list[str] = field(default_factory=list)  # directly in it
    folders: dict[str, Level] = field(default_factory=dict)

    def below(self) -> list[str]:
        """Every image in it, at any depth."""
        return [*self.images, *(name for f in self.folders.values() for name in f.below())]

    @property
    def base(self) -> str:
        """The folder's own name."""
        return self.name.rstrip("/").rpartition("/")[2]

    def split(self) -> SplitName | None:
        """The split in the folder's own name."""
        return split_of(self.base)

    def unlabelled(self) -> list[Level]:
        """The folders in it that are named `unlabelled` or alike."""
        return [f for f in self.folders.values() if (s := f.split()) and s.kind == UNLABELLED]

    def classes(self) -> dict[str, list[Level]]:
        """Class -> its folders: two where a name occurs both composed and decomposed (Unicode)."""
        groups: dict[str, list[Level]] = {}
        for name, folder in self.folders.items():
            if folder not in self.unlabelled():
                groups.setdefault(composed(name), []).append(folder)
        return groups


@dataclass(frozen=True)
class Layout:
    """`trees`: split -> the level of its class folders, train first. `flat`: the split folders without any."""

    top: Level
    trees: dict[str, Level]
    flat: list[Level]
    unlabelled: list[Level]


def layout_of(root: Path, images: Iterable[str], has_tables: bool) -> Layout:
    """Sort the images below `root` by their folders.

    Raises UserError: splits without train, two folders for one split, one without images, a split beside class
    folders.
    """
    top = _levels(images)
    while (inner := _only(root, top)) and inner.folders:
        if inner.split() and not all(f.split() for f in inner.folders.values()):
            break
        top = inner
    _check_empty(root, top)
    splits = _splits(root, top, has_tables)
    trees = {kind: _unwrapped(root, level, kind) for kind, level in splits.items()}
    labelled = {k: v for k, v in trees.items() if k == TRAIN or v.classes()} or {TRAIN: top}
    unlabelled = [*top.unlabelled(), *(labelled[TRAIN].unlabelled() if splits else [])]
    _check_classes(root, labelled)
    return Layout(top, labelled, [splits[k] for k in splits if k not in labelled], unlabelled)


def splits_of_images(images: Iterable[str]) -> dict[str, str | None]:
    """The split that each image's folders name: the innermost that can only be a split."""
    splits: dict[str, str | None] = {}
    todo: list[tuple[Level, str | None]] = [(_levels(images), None)]
    while todo:
        level, kind = todo.pop()
        splits |= dict.fromkeys(level.images, kind)
        sure = sure_splits(level.folders)
        todo += [(f, sure[n].kind if n in sure else kind) for n, f in level.folders.items()]
    return splits


def _levels(images: Iterable[str]) -> Level:
    top = Level()
    for name in images:
        at = top
        for part in name.split("/")[:-1]:
            at = at.folders.setdefault(part, Level(f"{at.name}{part}/"))
        at.images.append(name)
    return top


def _only(root: Path, level: Level) -> Level | None:
    """The one folder of a level that holds nothing else."""
    names = tree.folders(root / level.name) or list(level.folders)
    one = len(names) == len(level.folders) == 1 and not level.images
    return level.folders.get(names[0]) if one else None


def _check_empty(root: Path, top: Level) -> None:
    """Raise UserError where a split has a folder and no images: another would be tested on instead."""
    names = tree.folders(root / top.name)
    sure = sure_splits(names)
    splits = {name: split for name in names if (split := split_of(name))}
    present = {split.kind for name, split in splits.items() if name in top.folders}
    for name, split in splits.items():
        if split.kind in {*present, UNLABELLED} or not (name in sure or sure.keys() & top.folders):
            continue
        raise UserError(
            f"{root / top.name}: got {name}/ without images; expected images in every split; add them, or remove "
            "the folder"
        )


def _unwrapped(root: Path, level: Level, kind: str) -> Level:
    """The level of the class folders in a split folder: `seg_train/seg_train/cat`, `train/images/cat`."""
    while inner := _only(root, level):
        split = inner.split()
        if not inner.folders and not (split and split.kind == kind):
            break
        level = inner
    return level


def _splits(root: Path, top: Level, has_tables: bool) -> dict[str, Level]:
    """Split -> its folder, train first; {} where the folders of the level are classes."""
    folders = [f for levels in top.classes().values() for f in levels]
    sure = sure_splits(f.base for f in folders)
    by_kind: dict[str, list[Level]] = {}
    for folder in folders:
        if split := folder.split():
            by_kind.setdefault(split.kind, []).append(folder)
    for kind, same in by_kind.items():  # where train/ and train_masks/ stand there, train/ is meant
        exact = [f for f in same if f.base in sure and sure[f.base].exact]
        by_kind[kind] = exact or [f for f in same if f.base in sure] or same
    # Folders of images in a train folder: a split has them, a class mostly has not.
    nested = any(f.folders for f in by_kind.get(TRAIN, []))
    if not sure and not nested:
        return {}
    for kind, same in by_kind.items():
        if len(same) > 1:
            raise UserError(
                f"{root}: got {shortened(f.name for f in same)} for the {kind} split; expected one folder; "
                "merge them, or rename the one that is not meant"
            )
    others = [f.name for f in folders if not f.split()]
    beside = f" beside {shortened(others)}" if others else ""
    got = shortened(f.name for f in folders if f.base in sure or (not sure and f.split()))
    if TRAIN not in by_kind:
        raise UserError(
            f"{root}: got {got}{beside} without train/; expected train/ with the class folders in it; add train/, "
            "or rename a class that is named like a split"
        )
    if others and not (has_tables or (nested and sure)):
        raise UserError(
            f"{root}: got {got}{beside}, a split beside class folders; expected train/ with the class folders "
            "in it; move them there, or rename a class that is named like a split"
        )
    return {kind: by_kind[kind][0] for kind in sorted(by_kind, key=lambda k: k != TRAIN)}


def _check_classes(root: Path, trees: dict[str, Level]) -> None:
    """Raise UserError where a class is named like a split, unless all splits have that class."""
    for level in trees.values():
        for name, folders in level.classes().items():
            split = split_of(name)
            everywhere = len(trees) > 1 and all(name in t.classes() for t in trees.values())
            flat = not any(folder.folders for folder in folders)
            if split and split.exact and not (everywhere and flat) and len(level.classes()) > 1:
                raise UserError(
                    f"{root / level.name}: got the split {name}/ beside class folders; expected classes only; "
                    "move a split beside train/, or rename a class that is named like one"
                )
