"""The result of every source: class names and samples; and the checks that sources share."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from pipeline.core.errors import UserError

# Unicode's controls, halves of a character, ends of lines and paragraphs.
ILLEGIBLE = ("Cc", "Cs", "Zl", "Zp")
NO_LABEL = {"", "nan"}  # not "none", which is a class of its own in sets of defects
WHOLE = re.compile(r"([+-]?[0-9]{1,4000})(?:\.0*)?")  # Python refuses to read more digits


@dataclass(frozen=True)
class Sample:
    """One image before it is prepared. `label` None: unlabelled; `split` None: train, to be cut from."""

    origin: str  # a path below the source, or a file and its row; in one line
    read: Callable[[], Image.Image]
    label: int | None
    split: str | None


@dataclass(frozen=True)
class SourceImages:
    """The images of a source, its class names and the files it leaves out."""

    classes: list[str]
    samples: Sequence[Sample]
    notes: list[str] = field(default_factory=list)  # a sentence each
    left_out: dict[str, list[str]] = field(
        default_factory=dict
    )  # reason -> files that are not read


@dataclass(frozen=True)
class FileLabels:
    """Labels and splits of image files, by their names below the root."""

    classes: list[str]
    labels: dict[str, int | None]  # of every image that is read; None: unlabelled
    splits: dict[str, str]  # train, val or test, as the layout names it
    reasons: dict[str, str] = field(default_factory=dict)  # why other files are not read
    # Images that a table names and that are not there, with the row that names them.
    absent: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)  # files that the labels were read from


@dataclass(frozen=True)
class Columns:
    """Location of the labels: `prepare.label_column`, `prepare.image_column` and `prepare.label_pattern`."""

    label: str | None = None
    image: str | None = None
    pattern: str | None = None

    def only(self, source: str, *accepted: str) -> None:
        """Raise UserError where one is set that the source does not read."""
        keys = {"label": "label_column", "image": "image_column", "pattern": "label_pattern"}
        for name, key in keys.items():
            value = getattr(self, name)
            if value is not None and name not in accepted:
                raise UserError(
                    f"prepare.{key}: got {value!r}; expected null for source {source!r}; set it to null"
                )


Source = Callable[["str | None", Columns], SourceImages]  # prepare.path, the columns


def expanded(path: str | None) -> str | None:
    """Expand `~` to the home folder. Raises UserError: of an unknown user."""
    if path is None:
        return None
    try:
        return str(Path(path).expanduser())
    except RuntimeError:
        raise UserError(
            f"prepare.path: got {path}; expected a user of this machine after ~; write out the home folder"
        ) from None


def existing(source: str, path: str | None, expected: str) -> Path:
    """Check the path of a source. Raises UserError: no path, no such file or folder."""
    if path is None:
        raise UserError(
            f"prepare.path: got {path} for source '{source}'; expected {expected}; set it"
        )
    try:
        exists, readable = Path(path).exists(), Path(path).is_file() or Path(path).is_dir()
    except OSError as error:
        raise UserError(
            f"prepare.path: {path}: cannot be read ({error.strerror}); expected {expected}; correct it"
        ) from None
    if not exists:
        absolute = Path(path).is_absolute()
        where = "" if absolute else f" in {Path.cwd()}"
        copy = (
            ""
            if absolute
            else ", or give the absolute path (dvc exp run --temp and --queue run in a copy)"
        )
        raise UserError(
            f"prepare.path: {path}: no such file or folder{where}; expected {expected}; correct it{copy}"
        )
    if not readable:
        raise UserError(
            f"prepare.path: {path}: got neither a file nor a folder; expected {expected}; correct it"
        )
    return Path(path)


def legible(name: str) -> str:
    """Escape what would break a line of a report: line ends, control and broken characters."""
    return "".join(
        c.encode("unicode_escape").decode() if unicodedata.category(c) in ILLEGIBLE else c
        for c in name
    )


def composed(name: str) -> str:
    """Compose accents (Unicode NFC): macOS writes a name decomposed, other systems mostly do not."""
    return unicodedata.normalize("NFC", name)


def shortened(names: Iterable[str], limit: int = 5) -> str:
    """The first few names of a list, for a message."""
    ordered = sorted(names)
    more = f" and {len(ordered) - limit} more" if len(ordered) > limit else ""
    return ", ".join(map(legible, ordered[:limit])) + more


def whole_number(text: str) -> int | None:
    """The number that a cell holds, `3.0` included, which is how a table with gaps writes 3; else None.

    `1_10` and `1e3` are names, although Python reads them as numbers.
    """
    match = WHOLE.fullmatch(text.strip())
    return int(match[1]) if match else None


def classes_of(texts: Iterable[str], where: str) -> tuple[list[str], dict[str, int | None]]:
    """Cells of a label column -> class names, and the class of every cell (None: no label).

    Whole numbers are ordered as numbers and may begin at any; a negative one is no label. Other texts are in
    alphabetical order. Raises UserError: fractions.
    """
    cells = set(texts)
    labels = {cell: composed(cell.strip()) for cell in cells}
    known = {cell: label for cell, label in labels.items() if label.lower() not in NO_LABEL}
    numbers = {cell: whole_number(label) for cell, label in known.items()}
    names: list[str]
    if known and all(number is not None for number in numbers.values()):
        names = [str(n) for n in sorted({n for n in numbers.values() if n is not None and n >= 0})]
        known = {cell: str(number) for cell, number in numbers.items() if str(number) in names}
    else:
        values = {label: _number(label) for label in known.values()}
        fractions = [n for n, value in values.items() if value is not None and value % 1 != 0]
        if fractions and None not in values.values():
            raise UserError(
                f"{where}: got {min(fractions)!r}; expected class names or whole numbers; name the column of the "
                "classes in prepare.label_column"
            )
        names = sorted(set(known.values()))
    number = {name: i for i, name in enumerate(names)}
    return names, {cell: number[known[cell]] if cell in known else None for cell in cells}


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
