"""Parquet files in the Hugging Face schema: a column of images, structs {bytes, path}, and one of class labels."""

from __future__ import annotations

import io
import json
import re
import reprlib
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core.errors import UserError, nearest
from pipeline.data import tree
from pipeline.data.decoding import decode, what_it_is
from pipeline.prepare.sources.sample import (
    Columns,
    Sample,
    SourceImages,
    composed,
    existing,
    legible,
    shortened,
)
from pipeline.prepare.sources.splits import TRAIN, UNLABELLED, roles, split_of

EXPECTED = "a .parquet file, a folder of them, or a pattern ('/data/train-00000-of-*.parquet')"
# train-00000-of-00003.parquet, also with a hash behind it, as the hub names converted files; and 0000.parquet
SHARD = re.compile(r"(?P<name>.*?)(?P<index>\d+)(?P<rest>[-_]of[-_]\d+)(-[0-9a-f]{6,})?\.parquet")
NUMBERED = re.compile(r"(?P<name>)(?P<index>\d{4,})(?P<rest>)\.parquet")
MAX_CLASS_NUMBER = 1_000_000
MAX_SHARDS = 100_000
USUAL = ("label", "labels", "fine_label", "class", "target")


def read(path: str | None, columns: Columns) -> SourceImages:
    """Rows of one file or several; the split is in a file's name (`train-00000-of-00005`) or its folder's.

    Labels: `prepare.label_column`, else the ClassLabel column with most classes. A null, blank or negative label
    is no label. Class names may stand in another order in another file: rows are matched by name.
    Raises UserError, naming the file: no pyarrow, no or not all shards, no image column, an unknown label column,
    a damaged file, labels that are not class numbers or names, class names that another file does not have.
    """
    columns.only("parquet", "label", "image")
    root, files, left_out = _files(path)
    by_split = _by_split(root, files)
    readers = {file: _File(file, columns.image) for group in by_split.values() for file in group}
    first = next(iter(readers.values()))
    label_column, notes = _label_column(first, columns.label)
    labels = {file: _labels(reader, label_column) for file, reader in readers.items()}
    classes = _classes(readers, label_column, labels)
    ours = roles(kind for kind in by_split if kind != UNLABELLED)
    samples: list[Sample] = []
    for kind, group in by_split.items():
        for file in group:
            known = _numbers(labels[file], readers[file].class_names(label_column), classes)
            if kind == UNLABELLED:
                known = [None] * len(known)
            origin = legible(file.relative_to(root).as_posix())
            samples += _samples(readers[file], origin, known, ours.get(kind))
    return SourceImages(classes, samples, notes, left_out)


def _files(path: str | None) -> tuple[Path, list[Path], dict[str, list[str]]]:
    """The folder that names count from, the parquet files, other files by the reason why they are not read."""
    if path is not None and set("*?[") & set(path) and not Path(path).exists():
        parts = Path(path).parts
        fixed = next(i for i, part in enumerate(parts) if set("*?[") & set(part))
        root = Path(*parts[:fixed])
        matches = sorted(root.glob("/".join(parts[fixed:])))
        if not matches:
            raise UserError(
                f"prepare.path: got {path}, which matches no file; expected {EXPECTED}; correct it"
            )
        return root, matches, {}
    root = existing("parquet", path, EXPECTED)
    if root.is_file():
        return root.parent, [root], {}
    names: list[str] = []
    left_out: dict[str, list[str]] = {}
    for file in sorted(tree.walk(root), key=lambda f: f.name):
        suffix = Path(file.name).suffix.lower()
        if file.reason is None and suffix == ".parquet":
            names.append(file.name)
        else:
            why = file.reason or f"{suffix or legible(Path(file.name).name)}, not a parquet file"
            left_out.setdefault(why, []).append(file.name)
    if not names:
        raise UserError(
            f"prepare.path: {root}: got no .parquet file; expected {EXPECTED}; correct the path"
        )
    _check_shards(root, names)
    return root, [root / name for name in names], left_out


def _check_shards(root: Path, names: list[str]) -> None:
    """Raise UserError where a shard is missing, by the total or by a gap in the numbers, or there twice."""
    groups: dict[tuple[str, str, str], dict[int, str]] = {}
    for name in names:
        folder, _, file = name.rpartition("/")
        shard = SHARD.fullmatch(file) or NUMBERED.fullmatch(file)
        if shard is None:
            continue
        group = groups.setdefault((folder, shard["name"], shard["rest"]), {})
        if int(shard["index"]) in group:
            raise UserError(
                f"{root}: got {group[int(shard['index'])]} and {name}, the same shard twice; expected one "
                "version of each; remove the older one"
            )
        group[int(shard["index"])] = name
    for (folder, prefix, rest), group in groups.items():
        total = re.search(r"\d+", rest)
        for i in range(min(int(total[0]), MAX_SHARDS) if total else max(group) + 1):
            if i not in group:
                some = group[min(group)].rpartition("/")[2]
                width = len(some) - len(prefix) - len(some[len(prefix) :].lstrip("0123456789"))
                raise UserError(
                    f"{root / folder}: got no {prefix}{i:0{width}d}{rest}.parquet; expected all shards; add it, "
                    f"or give the part you want as a pattern (prepare.path: '{root / folder / some}')"
                )


def _by_split(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Split -> files, train first. Files that name no split, or all the same one, are train."""
    named: dict[str, list[Path]] = {}
    for file in files:
        names = reversed([*file.relative_to(root).parts[:-1], file.stem])
        split = next(filter(None, map(split_of, names)), None)
        named.setdefault(split.kind if split else "", []).append(file)
    if len(named) == 1:
        return {TRAIN: files}
    if TRAIN not in named or "" in named:
        bare = shortened(p.name for p in named.get("", [])) or "no train file"
        raise UserError(
            f"prepare.path: got the splits {', '.join(filter(None, named))} and {bare}; expected a split in each "
            "name, and train; name each file after its split (train-*.parquet, test-*.parquet)"
        )
    return {kind: named[kind] for kind in sorted(named, key=lambda kind: kind != TRAIN)}


class _File:
    """One parquet file, read by row group; the last group is cached."""

    def __init__(self, path: Path, image_column: str | None) -> None:
        try:
            from pyarrow import parquet
        except ImportError as error:
            raise UserError(
                f"source 'parquet' needs pyarrow ({error}); pip install '.[parquet]'"
            ) from None
        self.path = path
        try:
            self.file = parquet.ParquetFile(path)
        except Exception as error:  # pyarrow raises whatever the bytes lead it to
            raise UserError(
                f"{path}: not a readable parquet file ({_head_of(path) or error}); fetch it again"
            ) from None
        self.schema = self.file.schema_arrow
        self._group: tuple[int, list[Any]] = (-1, [])
        self.features = self._features()
        self.image = self._image_column(image_column)

    def _features(self) -> dict[str, dict[str, Any]]:
        """The Hugging Face description of the columns that the schema's metadata describes by a dict.

        Raises UserError: no JSON.
        """
        metadata = (self.schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            described = json.loads(metadata)
            for key in ("info", "features"):
                described = (described.get(key) if isinstance(described, dict) else None) or {}
        except (ValueError, RecursionError) as error:
            raise UserError(
                f"{self.path}: the huggingface metadata is damaged ({type(error).__name__}: {error}); "
                "fetch it again"
            ) from None
        return (
            {n: f for n, f in described.items() if isinstance(f, dict)}
            if isinstance(described, dict)
            else {}
        )

    def class_names(self, column: str) -> list[str] | None:
        """The class names of a ClassLabel column, None where the metadata has none.

        Raises UserError: names by other keys than 0, 1 and so on.
        """
        feature = self.features.get(column, {})
        names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
        if isinstance(names, dict):  # {"0": "cat", "1": "dog"}, in any order
            try:
                keys = sorted(names, key=int)
            except ValueError:
                keys = []
            if list(map(int, keys)) != list(range(len(names))):
                raise UserError(
                    f"{self.path}: column {column!r}: class names: got the keys {shortened(names)}; expected 0 to "
                    f"{len(names) - 1}, each once; correct the metadata"
                )
            names = [names[key] for key in keys]
        return (
            [composed(str(name)) for name in names] if isinstance(names, list) and names else None
        )

    def _image_column(self, requested: str | None) -> str:
        from pyarrow import types

        def is_image(kind: Any) -> bool:
            inner = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            return bool(inner or types.is_binary(kind) or types.is_large_binary(kind))

        images = [f.name for f in self.schema if is_image(f.type)]
        if requested is not None and requested not in images:
            raise UserError(
                f"prepare.image_column: got {requested!r}, which is no column of images in {self.path}; "
                f"{nearest(requested, images)}"
            )
        if requested is None and len(images) != 1:
            raise UserError(
                f"{self.path}: image columns: got {', '.join(images) or 'none'} of {', '.join(self.schema.names)}"
                "; expected one, a struct {bytes, path} or binary; name one in prepare.image_column"
            )
        return requested or str(images[0])

    def column(self, name: str) -> list[Any]:
        """All values of a column. Raises UserError: this file lacks it, or is damaged."""
        if name not in self.schema.names:
            raise UserError(
                f"{self.path}: got no column {name!r}; {nearest(name, self.schema.names)}"
            )
        try:
            values: list[Any] = self.file.read(columns=[name]).column(0).to_pylist()
        except Exception as error:  # as above
            raise UserError(f"{self.path}: damaged ({error}); fetch it again") from None
        return values

    def image_at(self, group: int, row: int) -> Image.Image:
        """Decode the image of a row of a row group."""
        if self._group[0] != group:
            table = self.file.read_row_group(group, columns=[self.image])
            self._group = (group, table.column(0).to_pylist())
        cell = self._group[1][row]
        encoded = cell["bytes"] if isinstance(cell, dict) else cell
        if encoded is None:
            raise ValueError("the row holds no bytes, only a path" if cell else "the row is null")
        return decode(io.BytesIO(encoded))


def _head_of(path: Path) -> str | None:
    """Name a file that pyarrow cannot read by its first bytes; None where they are unknown."""
    try:
        with path.open("rb") as file:
            head = file.read(4096)
    except OSError as error:
        return str(error.strerror)
    name = what_it_is(head)
    return None if name.startswith("no format") else name


def _label_column(file: _File, requested: str | None) -> tuple[str, list[str]]:
    """The column of class labels, and a note where the data set has others."""
    columns = [n for n in file.schema.names if n != file.image]
    if requested is not None:
        if requested not in columns:
            raise UserError(
                f"prepare.label_column: got {requested!r}, which is no column of {file.path}; "
                f"{nearest(requested, columns)}"
            )
        return requested, []
    labels = [n for n in columns if file.class_names(n)]
    candidates = sorted(labels, key=lambda n: -len(file.class_names(n) or ())) or [
        n for n in USUAL if n in columns
    ]
    if not candidates:
        raise UserError(
            f"{file.path}: label column: got {', '.join(columns) or 'no columns'}; expected a ClassLabel or one "
            f"named {', '.join(USUAL)}; name the column of labels in prepare.label_column"
        )
    others = f"labels: {candidates[0]} (prepare.label_column: also {', '.join(candidates[1:])})"
    return candidates[0], [others] if candidates[1:] else []


def _labels(file: _File, column: str) -> list[int | str | None]:
    """The labels of a file: class numbers, or texts; None for a null, a NaN, a blank text or a negative number."""
    names = file.class_names(column)
    labels: list[int | str | None] = []
    for value in file.column(column):
        label = (composed(value) if value.strip() else None) if isinstance(value, str) else value
        if isinstance(label, float) and (label != label or label.is_integer()):
            label = None if label != label else int(label)
        if label is not None and not isinstance(label, str):
            if not isinstance(label, int) or label >= MAX_CLASS_NUMBER:
                raise UserError(
                    f"{file.path}: column {column!r}: got {reprlib.repr(value)}; expected class numbers from 0 to "
                    f"{MAX_CLASS_NUMBER - 1}, or class names; name another in prepare.label_column"
                )
            label = None if label < 0 else int(label)
            if names and label is not None and label >= len(names):
                raise UserError(
                    f"{file.path}: column {column!r}: got class {label}; expected 0 to {len(names) - 1}, as in "
                    "its metadata; correct the metadata or the labels"
                )
        labels.append(label)
    return labels


def _classes(
    files: dict[Path, _File], column: str, labels: dict[Path, list[int | str | None]]
) -> list[str]:
    """The class names of all files: those of the first that has any, else the texts, else the numbers."""
    first = next((f for f in files.values() if f.class_names(column)), None)
    names = first.class_names(column) if first else None
    numbers = {label for cells in labels.values() for label in cells if isinstance(label, int)}
    texts = {label for cells in labels.values() for label in cells if isinstance(label, str)}
    if names is None and numbers and texts:
        mixed = next(f for f, cells in labels.items() if any(isinstance(c, str) for c in cells))
        raise UserError(
            f"{mixed}: column {column!r}: got {min(texts)!r}, and class numbers elsewhere; expected one or the "
            "other; correct the column"
        )
    if names is None and texts:
        return sorted(texts)
    if names is None:
        return [str(number) for number in sorted(numbers)]
    for path, file in files.items():
        own = file.class_names(column)
        unknown = sorted(
            {*(own or ()), *(c for c in labels[path] if isinstance(c, str))} - set(names)
        )
        if unknown and first:
            raise UserError(
                f"{path}: got the class {unknown[0]!r}, which {first.path} does not have; "
                f"{nearest(unknown[0], names)}"
            )
        if own is None and first and any(isinstance(c, int) for c in labels[path]):
            raise UserError(
                f"{path}: got class numbers and no names, where {first.path} has names; expected names in every "
                "file; fetch it again"
            )
    return names


def _numbers(
    labels: list[int | str | None], own: list[str] | None, classes: list[str]
) -> list[int | None]:
    """Map the labels of a file to the classes of all files, by name where its own names are in another order."""
    number = {name: i for i, name in reversed(list(enumerate(classes)))}
    names = dict(enumerate(own or ()))
    return [
        None if label is None
        else label if own == classes and isinstance(label, int)
        else number[label if isinstance(label, str) else names.get(label, str(label))]
        for label in labels
    ]  # fmt: skip


def _samples(file: _File, origin: str, labels: list[int | None], split: str | None) -> list[Sample]:
    samples: list[Sample] = []
    for group in range(file.file.num_row_groups):
        for at in range(file.file.metadata.row_group(group).num_rows):
            row = len(samples)
            own = split or (TRAIN if labels[row] is None else None)
            samples.append(
                Sample(f"{origin}:{row}", partial(file.image_at, group, at), labels[row], own)
            )
    return samples
