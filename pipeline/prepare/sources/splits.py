"""Split names as people write them: train, Training, seg_train, valid, dev, test_images, unlabeled."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

TRAIN, VAL, TEST, UNLABELLED = "train", "val", "test", "unlabelled"
WORDS = {
    TRAIN: ("train", "training", "trainval"),
    VAL: ("val", "valid", "validate", "validation", "dev", "devel", "development"),
    TEST: ("test", "testing", "eval", "evaluation", "holdout"),
    UNLABELLED: ("unlabelled", "unlabeled", "unlabel", "unsup", "unsupervised", "nolabel"),
}
KIND = {word: kind for kind, words in WORDS.items() for word in words}


@dataclass(frozen=True)
class SplitName:
    """The split that a name names. `exact`: the name holds nothing else but digits (`train2017`)."""

    kind: str
    exact: bool


def split_of(name: str) -> SplitName | None:
    """Find the one split in a folder's or file's name; None for no split, and for several.

    Words are parted by whatever is no letter, and by capitals (`TrainImages`); `trainset` counts as train.
    """
    words = re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", name)
    kinds = [KIND.get(word.lower()) or KIND.get(word.lower().removesuffix("set")) for word in words]
    named = set(kinds) - {None}
    if UNLABELLED in named:
        named = {UNLABELLED}
    if len(named) != 1:
        return None
    return SplitName(str(named.pop()), None not in kinds)


def split_of_path(path: str) -> str | None:
    """The split that a file's folders name: the innermost that names nothing else, else the outermost."""
    folders = path.split("/")[:-1]
    exact = [s.kind for folder in folders if (s := split_of(folder)) and s.exact]
    outer = split_of(folders[0]) if folders else None
    return exact[-1] if exact else (outer.kind if outer else None)


def roles(kinds: Iterable[str]) -> dict[str, str | None]:
    """Split names -> ours: train (None) is cut further; val without test is the test split."""
    ours: dict[str, str | None] = {kind: kind for kind in kinds}
    if TEST not in ours and VAL in ours:
        ours[VAL] = TEST
    return {kind: None if kind == TRAIN else role for kind, role in ours.items()}
