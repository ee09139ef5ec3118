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
    """The split in a name, and the other words of it: none in `train2017`, `images` in `test_images`."""

    kind: str
    rest: tuple[str, ...]

    @property
    def exact(self) -> bool:
        """Whether the name holds no other word."""
        return not self.rest


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
    rest = (word.lower() for word, kind in zip(words, kinds, strict=True) if kind is None)
    return SplitName(str(named.pop()), tuple(rest))


def sure_splits(names: Iterable[str]) -> dict[str, SplitName]:
    """Select the folders of one level that can only be splits.

    `train` is one, and so are `x_train` and `x_test`; `test_tube` beside `beaker` may be a class.
    """
    splits = {name: split_of(name) for name in names}
    named = {name: split for name, split in splits.items() if split}
    return {
        name: split
        for name, split in named.items()
        if split.exact
        or any(s.rest == split.rest and s.kind != split.kind for s in named.values())
        or (len(named) == len(splits) > 1 and TRAIN in {s.kind for s in named.values()})
    }


def roles(kinds: Iterable[str]) -> dict[str, str | None]:
    """Map split names to ours: train (None) is split further; val without test is the test split."""
    ours: dict[str, str | None] = {kind: kind for kind in kinds}
    if TEST not in ours and VAL in ours:
        ours[VAL] = TEST
    return {kind: None if kind == TRAIN else role for kind, role in ours.items()}
