"""What every source gives: class names and samples, and the words for what a source may lack."""

from __future__ import annotations

import unicodedata
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipeline.core.errors import UserError

UNFIT = (
    "Cc",
    "Cs",
    "Zl",
    "Zp",
)  # Unicode's controls, halves of a character, line and paragraph ends


@dataclass(frozen=True)
class Sample:
    """One picture before it is prepared. `label` None: unlabelled; `split` None: train, to be cut from."""

    origin: str  # where it was read from, for people: a path below the source, a file and its row; legible
    read: Callable[[], Image.Image]
    label: int | None
    split: str | None


@dataclass(frozen=True)
class SourceImages:
    """All that a source holds. `notes`: what a user should know of the reading, a sentence each."""

    classes: list[str]
    samples: Sequence[Sample]
    notes: list[str] = field(default_factory=list)


Source = Callable[["str | None", "str | None"], SourceImages]  # (path, label column) -> Found


def existing(source: str, path: str | None, what: str) -> Path:
    """The path a source reads. Raises UserError: none given, nothing there."""
    if path is None:
        raise UserError(f"prepare.path: got {path}; source '{source}' needs {what}")
    try:
        there, readable = Path(path).exists(), Path(path).is_file() or Path(path).is_dir()
    except OSError as error:
        raise UserError(f"prepare.path: {path}: {error.strerror}; give {what}") from None
    if not there:
        raise UserError(f"prepare.path: {path} does not exist; give {what}")
    if not readable:
        raise UserError(f"prepare.path: {path} is neither a file nor a folder; give {what}")
    return Path(path)


def legible(name: str) -> str:
    """A name in one line that any file can hold: line breaks, controls and broken characters as escapes."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in UNFIT else c for c in name
    )


def check_label_column(source: str, column: str | None) -> None:
    """Raise UserError where a label column is named for a source that has none."""
    if column is not None:
        raise UserError(
            f"prepare.label_column: got {column!r}, but source {source!r} has no columns; set it to null"
        )


def train_and_test(splits: Sequence[str]) -> dict[str, str | None]:
    """A source's own split names -> ours: `train` is cut further; `val` without `test` is the test split."""
    named = {"validation": "val", "valid": "val", "dev": "val"}
    ours: dict[str, str | None] = {s: named.get(s, s) for s in splits}
    if "test" not in ours.values():
        ours = {s: "test" if name == "val" else name for s, name in ours.items()}
    return {s: None if name == "train" else name for s, name in ours.items()}
