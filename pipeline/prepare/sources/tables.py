"""Labels of image files from .csv and .tsv tables beside them: `file,label`, ids without suffix, one-hot."""

from __future__ import annotations

import csv
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.core.errors import UserError, nearest
from pipeline.prepare.sources.layout import splits_of_images
from pipeline.prepare.sources.sample import (
    Columns,
    FileLabels,
    classes_of,
    composed,
    legible,
    shortened,
    whole_number,
)
from pipeline.prepare.sources.splits import TRAIN, UNLABELLED, split_of

SUFFIXES = {".csv": ",;\t|", ".tsv": "\t"}  # and the delimiters that each may have
USUAL = (
    *("label", "labels", "fine_label", "class", "target"),
    *("class_name", "classname", "label_name", "classes", "category", "species", "breed"),
    *("diagnosis", "dx", "class_id", "classid", "category_id", "label_id", "y"),
)
SPLIT_COLUMNS = ("split", "set", "subset", "partition", "phase", "data set", "data_set", "usage")
NAMES_OF_COLUMNS = {
    *(*USUAL, *SPLIT_COLUMNS, "id", "name", "path", "file", "filename", "file_name", "filepath"),
    *("file_path", "image", "images", "image_id", "image_name", "image_path", "img", "photo"),
}


@dataclass(frozen=True)
class Table:
    """A table: its name below the root, the column names, the rows with their line numbers."""

    name: str
    header: list[str]
    rows: list[tuple[int, list[str]]]

    def column(self, name: str) -> list[str]:
        """The cells of a column."""
        at = self.header.index(name)
        return [cells[at].strip() for _, cells in self.rows]


@dataclass(frozen=True)
class Reading:
    """The interpretation of a table: its column of images, its labels and splits."""

    table: Table
    image: str
    label: str  # a column, or "" for one-hot columns
    labels: list[str]  # of every row
    split: str | None  # the column of splits
    notes: list[str]


def read(root: Path, images: list[str], names: list[str], columns: Columns) -> FileLabels:
    """Read the labels of all tables that name images below `root`.

    Raises UserError: no table with a column of image names and one of labels, a name that matches several images,
    an image with two labels.
    """
    index = _Index(images)
    readings, reasons, faults = [], {}, []
    for name in names:
        if "submission" in name.lower():
            reasons[name] = "a table of answers to hand in, by its name"
            continue
        try:
            readings.append(_reading(_table(root, name), index, columns))
        except UserError as error:
            faults.append(str(error))
            reasons[name] = "a table in which no labels are understood"
    usual = [r for r in readings if columns.label or not r.label or r.label.lower() in USUAL]
    for reading in readings if usual else []:
        if reading not in usual:  # `test.csv` with a column of widths is no table of labels
            reasons[reading.table.name] = "a table in which no labels are understood"
    readings = usual or readings
    for reading in readings:
        _check_splits(reading)
    if not readings:
        several = f"{root}: got {len(names)} tables and none with labels; {'; '.join(faults[:3])}"
        raise UserError(faults[0] if len(faults) == 1 else several)
    return _joined(index, images, readings, reasons)


def check_agreement(root: Path, images: list[str], names: list[str], folders: FileLabels) -> None:
    """Raise UserError where a table gives the images of class folders other labels than their folders."""
    index = _Index(images)
    for name in names:
        try:
            reading = _reading(_table(root, name), index, Columns(), usual_only=True)
        except UserError:
            continue
        pairs: dict[int, set[str]] = {}
        for cell, label in zip(reading.table.column(reading.image), reading.labels, strict=True):
            for image in index.find(cell, reading.table.name)[:1]:
                number = folders.labels.get(image)
                if number is not None and label:
                    pairs.setdefault(number, set()).add(label)
        torn = [number for number, labels in pairs.items() if len(labels) > 1]
        if torn or len({label for labels in pairs.values() for label in labels}) < len(pairs):
            example = folders.classes[torn[0] if torn else min(pairs)]
            raise UserError(
                f"{root / name}: got other labels (column {reading.label or 'one-hot'!r}) than the class folders, "
                f"first for images of {example}/; expected labels of one kind; set prepare.label_column to "
                "read the table, or move it away to read the folders"
            )


class _Index:
    """Images by path, file name and stem."""

    def __init__(self, images: list[str]) -> None:
        self.paths: dict[str, str] = {composed(name): name for name in images}
        self.names: dict[str, list[str]] = {}
        self.kinds = splits_of_images(images)
        for name in images:
            path = PurePosixPath(composed(name))
            for key in {path.name, path.stem}:
                self.names.setdefault(key, []).append(name)

    def find(self, cell: str, table: str) -> list[str]:
        """The images that a cell of a table may mean: one, none, or several of one name."""
        value = composed(cell.strip().replace("\\", "/")).removeprefix("./")
        folder, _, file = table.rpartition("/")
        for path in (f"{folder}/{value}" if folder else value, value):
            if path in self.paths:
                return [self.paths[path]]
        base = value.rpartition("/")[2]
        same = self.names.get(base) or self.names.get(PurePosixPath(base).stem) or []
        same = [name for name in same if _same_folders(name, value)]
        kind = split_of(file) or split_of(folder.rpartition("/")[2])
        choices: list[Callable[[str], bool]] = [
            lambda name: kind is not None and self.kinds[name] == kind.kind,
            lambda name: name.startswith(f"{folder}/"),
            # A table that names no split and no folder: Kaggle's ids are those of train/, test/ has them again.
            lambda name: kind is None and self.kinds[name] == TRAIN,
        ]
        for fits in choices:
            same = [name for name in same if fits(name)] or same
        if kind is not None and any(k == kind.kind for k in self.kinds.values()):
            same = [name for name in same if self.kinds[name] in (kind.kind, None)]
        return same


def _same_folders(name: str, value: str) -> bool:
    """Whether one path ends in the other's folders: `images/0.png` may be `/data/images/0`, not `masks/0.png`."""
    ours, theirs = composed(name).split("/")[-2::-1], value.split("/")[-2::-1]
    return all(a == b for a, b in zip(ours, theirs, strict=False))


def _table(root: Path, name: str) -> Table:
    path = root / name
    try:
        text = path.read_bytes().decode("utf-8-sig")
        first = text.split("\n", 1)[0]
        delimiter = max(SUFFIXES[path.suffix.lower()], key=first.count)
        lines = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        rows = [(lines.line_num, cells) for cells in lines if any(map(str.strip, cells))]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(
            f"{path}: cannot be read ({error}); expected a table in UTF-8; save it again"
        ) from None
    if len(rows) < 2:
        raise UserError(
            f"{path}: got {len(rows)} lines; expected a header and a row an image; complete or remove it"
        )
    header = [legible(composed(cell.strip())) for cell in rows[0][1]]
    for line, cells in rows:
        if len(cells) != len(header):
            raise UserError(
                f"{path}: got {len(cells)} columns in line {line}; expected {len(header)}, as in the header; "
                "correct the line"
            )
    return Table(name, header, rows[1:])


def _reading(table: Table, index: _Index, columns: Columns, usual_only: bool = False) -> Reading:
    if _is_row(table, index):  # no header: the first row is an image's
        header = [f"column {i + 1}" for i in range(len(table.header))]
        table = Table(table.name, header, [(1, table.header), *table.rows])
    got = f"{table.name}: got the header {', '.join(table.header)}"
    image = _image_column(table, index, columns.image, got)
    rest = [name for name in table.header if name != image]
    split, unread = _split_column(table, [n for n in rest if n != columns.label])
    rest = [name for name in rest if name != split]
    usual = sorted((n for n in rest if n.lower() in USUAL), key=lambda n: USUAL.index(n.lower()))
    if columns.label is not None:
        if columns.label not in rest:
            raise UserError(
                f"{got}; expected prepare.label_column {columns.label!r}; {nearest(columns.label, rest)}"
            )
        usual = [columns.label]
    if not usual and len(rest) == 1 and not usual_only:
        usual = rest
    if usual:
        also = [n for n in rest if n.lower() in USUAL and n != usual[0]]
        more = f" (prepare.label_column: also {', '.join(also)})" if also else ""
        notes = [f"labels: column {usual[0]!r} of {legible(table.name)}{more}"]
        notes += [note for name, note in unread.items() if name != usual[0]]
        return Reading(table, image, usual[0], table.column(usual[0]), split, notes)
    hot = [n for n in rest if {whole_number(cell) for cell in table.column(n)} <= {0, 1}]
    if len(hot) < 2:
        raise UserError(
            f"{got}; expected a column of labels ({', '.join(USUAL[:5])}, ...) or one-hot columns of 0 and 1; "
            "name the column in prepare.label_column"
        )
    notes = [f"labels: one-hot columns {shortened(hot)} of {legible(table.name)}"]
    notes += [note for name, note in unread.items() if name not in hot]
    return Reading(table, image, "", _one_hot(table, hot), split, notes)


def _is_row(table: Table, index: _Index) -> bool:
    """Whether the first line names an image: by suffix or folder, or by stem without the names of columns.

    A label of the first row stands in other rows of its column too, the column's name does not.
    """
    images = [cell for cell in table.header if index.find(cell, table.name)]
    if any(PurePosixPath(cell.replace("\\", "/")).stem != cell for cell in images):
        return True
    names = [cell for cell in table.header if cell.lower() in NAMES_OF_COLUMNS]
    return bool(images) and all(cell in table.column(cell) for cell in names)


def _image_column(table: Table, index: _Index, requested: str | None, got: str) -> str:
    """The column that names most images."""
    hits = {
        name: frozenset(
            matches[0]
            for cell in set(table.column(name))
            if (matches := index.find(cell, table.name))
        )
        for name in table.header
    }
    if requested is not None:
        if not hits.get(requested):
            raise UserError(
                f"{got}; expected prepare.image_column {requested!r} to name images; "
                f"{nearest(requested, [n for n in hits if hits[n]])}"
            )
        return requested
    most = max(map(len, hits.values()))
    best = [name for name in hits if len(hits[name]) == most]
    if most == 0:
        raise UserError(
            f"{got}; expected a column of image names, with or without suffix "
            f"({shortened(index.paths, 3) or 'no images'}); correct the names, or prepare.path"
        )
    if len({hits[name] for name in best}) > 1:
        raise UserError(
            f"{got}, image names in {', '.join(best)}; expected one column of image names; name it in "
            "prepare.image_column"
        )
    return best[0]


def _one_hot(table: Table, hot: list[str]) -> list[str]:
    columns = [table.column(name) for name in hot]
    labels = []
    for (line, _), cells in zip(table.rows, zip(*columns, strict=True), strict=True):
        ones = [name for name, cell in zip(hot, cells, strict=True) if whole_number(cell) == 1]
        if len(ones) != 1:
            raise UserError(
                f"{table.name}: got {len(ones)} ones in line {line} ({', '.join(ones) or 'all 0'}); expected one "
                "class an image, one-hot; name a single column in prepare.label_column"
            )
        labels.append(ones[0])
    return labels


def _kind(cell: str) -> str | None:
    split = split_of(cell)
    return split.kind if split else None


def _split_column(table: Table, names: list[str]) -> tuple[str | None, dict[str, str]]:
    """The column of splits, one that holds nothing else before one that does; a note on each that holds none."""
    best: tuple[str | None, bool] = (None, False)
    unread = {}
    for name in names:
        cells = set(table.column(name)) - {""}
        if name.lower() not in SPLIT_COLUMNS or not cells:
            continue
        known = {cell for cell in cells if _kind(cell)}
        if not known:
            values = f"{legible(table.name)} not read: values {shortened(cells)}"
            unread[name] = f"column {name!r} of {values}"
        elif not best[0] or (known == cells and not best[1]):
            best = (name, known == cells)
    return best[0], unread


def _check_splits(reading: Reading) -> None:
    """Raise UserError where a cell of the column of splits is no split: its image would be trained on."""
    table = reading.table
    cells = table.column(reading.split) if reading.split else []
    for (line, _), cell in zip(table.rows, cells, strict=False):
        if cell and not _kind(cell):
            raise UserError(
                f"line {line} of {table.name}: column {reading.split!r}: got {cell!r}; expected train, val, test, "
                "unlabelled or nothing; correct the cell, or rename the column if it holds no splits"
            )


def _joined(
    index: _Index, images: list[str], readings: list[Reading], reasons: dict[str, str]
) -> FileLabels:
    """Join all tables to one label an image."""
    texts: dict[str, str] = {}
    splits: dict[str, str] = {}
    absent: dict[str, str] = {}
    rows: dict[str, str] = {}
    again = 0
    for reading in readings:
        table, by_name = reading.table, split_of(PurePosixPath(reading.table.name).name)
        given = table.column(reading.split) if reading.split else [""] * len(table.rows)
        cells = table.column(reading.image)
        listed = zip(table.rows, cells, reading.labels, given, strict=True)
        for (line, _), cell, text, split in listed:
            row, matches = f"line {line} of {table.name}", index.find(cell, table.name)
            if len(matches) > 1:
                raise UserError(
                    f"{row}: got {cell!r}, which matches {shortened(matches)}; expected one image; write its "
                    "path from the table"
                )
            name = matches[0] if matches else str(PurePosixPath(table.name).parent / cell)
            if not matches:
                absent[name] = f"named in {row}, but not there"
            if texts.get(name, text) != text:
                raise UserError(
                    f"{row}: got {text!r} for {name}, which is {texts[name]!r} in {rows[name]}; expected one "
                    "label an image; correct the table, or name another column in prepare.label_column"
                )
            again += name in texts
            kind = (
                _kind(split)
                or index.kinds.get(name)
                or (by_name.kind if by_name else None)
                or TRAIN
            )
            texts[name], rows[name] = ("", row) if kind == UNLABELLED else (text, row)
            splits[name] = TRAIN if kind == UNLABELLED else kind
    where = ", ".join(reading.table.name for reading in readings)
    for name in images:
        if name not in texts and index.kinds[name] == UNLABELLED:
            texts[name], splits[name] = "", TRAIN
        elif name not in texts:
            folder = name.rpartition("/")[0]
            reasons[name] = f"no label in {legible(where)}" + (
                f", in {legible(folder)}/" if folder else ""
            )
    classes, number = classes_of(texts.values(), where)
    notes = [note for reading in readings for note in reading.notes]
    notes += [f"rows that name an image again, with the same label: {again}"] * bool(again)
    labels = {name: number[text] for name, text in texts.items()}
    return FileLabels(
        classes, labels, splits, reasons, absent, notes, [r.table.name for r in readings]
    )
