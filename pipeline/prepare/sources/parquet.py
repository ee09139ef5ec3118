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
from pipeline.data.decoding import decode
from pipeline.prepare.sources.sample import Sample, SourceImages, existing, legible, train_and_test

EXPECTED = "a .parquet file, a folder of them, or a pattern ('/data/train-00000-of-*.parquet')"
SPLITS = "train|test|validation|valid|val|dev"
SHARD = re.compile(r"-(\d+)-of-(\d+)\.parquet$")
MAX_CLASS_NUMBER = 1_000_000  # class numbers
USUAL = ("label", "labels", "fine_label", "class", "target")


def read(path: str | None, label_column: str | None) -> SourceImages:
    """Rows of one file or several; the split is in a file's name (`train-00000-of-00005`) or its folder's.

    Labels: `label_column`, else the ClassLabel column with most classes. A null or negative label is no label.
    Raises UserError: no pyarrow, no or not all shards, no image column, an unknown label column, a damaged
    file, labels that are not class numbers or names.
    """
    by_split = _by_split(_files(path))
    tables = {f: _Table(f) for files in by_split.values() for f in files}
    first = next(iter(tables.values()))
    chosen, notes = _label_column(first, label_column)
    labels = {f: table.column(chosen) for f, table in tables.items()}
    classes = _classes(first, chosen, [v for column in labels.values() for v in column])
    number = {name: i for i, name in enumerate(classes)}
    samples: list[Sample] = []
    for split, files in by_split.items():
        for file in files:
            samples += _samples(tables[file], labels[file], number, split)
    return SourceImages(classes, samples, notes)


def _files(path: str | None) -> list[Path]:
    if path is not None and set("*?[") & set(path) and not Path(path).exists():
        found = sorted(Path(path).parent.glob(Path(path).name))
        if not found:
            raise UserError(f"prepare.path: no file matches {path}; give {EXPECTED}")
        return found
    root = existing("parquet", path, EXPECTED)
    if root.is_file():
        return [root]
    found = sorted(root.rglob("*.parquet"))
    if not found:
        raise UserError(f"prepare.path: {root} holds no .parquet file; give {EXPECTED}")
    _check_shards(found)
    return found


def _check_shards(found: list[Path]) -> None:
    there = {p.name for p in found}
    for path in found:
        shard = SHARD.search(path.name)
        for i in range(int(shard[2]) if shard else 0):
            assert shard is not None
            name = f"{path.name[: shard.start()]}-{i:0{len(shard[1])}d}-of-{shard[2]}.parquet"
            if name not in there:
                raise UserError(
                    f"{path.parent}: {name} is missing; add it, or give the part you want as a pattern "
                    f"(prepare.path: '{path.parent}/{path.name}')"
                )


def _by_split(found: list[Path]) -> dict[str | None, list[Path]]:
    """Files by our split, None (train, to be cut from) first; files that name no split are all of None."""
    named: dict[str, list[Path]] = {}
    for path in found:
        name = re.match(rf"({SPLITS})[-_.]", path.name) or re.fullmatch(
            f"({SPLITS})", path.parent.name
        )
        named.setdefault(name[1] if name else "", []).append(path)
    if len(named) == 1:
        return {None: found}
    if "train" not in named or "" in named:
        bare = ", ".join(p.name for p in named.get("", [])) or "no train file"
        raise UserError(
            f"prepare.path: splits {', '.join(filter(None, named))} and {bare}; name each file after its split "
            "(train-*.parquet, test-*.parquet)"
        )
    ours = train_and_test(["train", *(s for s in named if s != "train")])
    return {ours[name]: named[name] for name in ours}


class _Table:
    """One parquet file; rows are read by row group, the last group is kept."""

    def __init__(self, path: Path) -> None:
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
                f"{path}: not a readable parquet file ({error}); fetch it again"
            ) from None
        self.schema = self.file.schema_arrow
        self._held: tuple[int, list[Any]] = (-1, [])
        self.features = self._features()
        self.image = self._image_column()

    def _features(self) -> dict[str, Any]:
        """The Hugging Face feature description in the schema's metadata, {} without one.

        Raises UserError: one that is damaged.
        """
        metadata = (self.schema.metadata or {}).get(b"huggingface", b"{}")
        try:
            found = json.loads(metadata).get("info", {}).get("features", {})
            described = {name: dict(feature) for name, feature in found.items()}
            for feature in described.values():
                if feature.get("_type") == "ClassLabel":
                    feature["names"] = [str(n) for n in feature["names"]]
        except (ValueError, AttributeError, KeyError, TypeError, RecursionError) as error:
            raise UserError(
                f"{self.path}: the huggingface metadata is damaged ({type(error).__name__}: {error}); "
                "fetch it again"
            ) from None
        return described

    def _image_column(self) -> str:
        from pyarrow import types

        def is_image(kind: Any) -> bool:
            inner = types.is_struct(kind) and kind.get_field_index("bytes") >= 0
            return bool(inner or types.is_binary(kind) or types.is_large_binary(kind))

        found = [f.name for f in self.schema if is_image(f.type)]
        if len(found) != 1:
            raise UserError(
                f"{self.path}: image columns: {', '.join(found) or 'none'}, of {', '.join(self.schema.names)}; "
                "exactly one is needed, a struct {bytes, path} or binary"
            )
        return str(found[0])

    def column(self, name: str) -> list[Any]:
        """All values of a column. Raises UserError: this file lacks it, or is damaged."""
        if name not in self.schema.names:
            raise UserError(f"{self.path}: no column {name!r}; {nearest(name, self.schema.names)}")
        try:
            values: list[Any] = self.file.read(columns=[name]).column(0).to_pylist()
        except Exception as error:  # as above
            raise UserError(f"{self.path}: damaged ({error}); fetch it again") from None
        return values

    def picture(self, group: int, row: int) -> Image.Image:
        """Decode the image of a row of a row group."""
        if self._held[0] != group:
            table = self.file.read_row_group(group, columns=[self.image])
            self._held = (group, table.column(0).to_pylist())
        cell = self._held[1][row]
        encoded = cell["bytes"] if isinstance(cell, dict) else cell
        if encoded is None:
            raise ValueError("the row holds no bytes, only a path")
        return decode(io.BytesIO(encoded))


def _label_column(table: _Table, wanted: str | None) -> tuple[str, list[str]]:
    """The column of class labels, and a note where the data set has others."""
    features = table.features
    labels = [n for n, f in features.items() if f.get("_type") == "ClassLabel"]
    columns = [n for n in table.schema.names if n != table.image]
    if wanted is not None:
        if wanted not in columns:
            raise UserError(
                f"prepare.label_column: {table.path} has no column {wanted!r}; {nearest(wanted, columns)}"
            )
        return wanted, []
    found = sorted(labels, key=lambda n: -len(features[n]["names"])) or [
        n for n in USUAL if n in columns
    ]
    if not found:
        raise UserError(
            f"{table.path}: no ClassLabel column; got {', '.join(columns) or 'no other column'}; name the "
            "one that holds the labels in prepare.label_column"
        )
    others = f"labels: {found[0]} (prepare.label_column: also {', '.join(found[1:])})"
    return found[0], [others] if found[1:] else []


def _classes(table: _Table, column: str, values: list[Any]) -> list[str]:
    names = table.features.get(column, {}).get("names")
    if names is None and all(v is None or isinstance(v, str) for v in values):
        return sorted({v for v in values if v is not None})
    for value in values:
        if value is not None and not (type(value) is int and value < MAX_CLASS_NUMBER):
            raise UserError(
                f"{table.path}: column {column!r} holds {reprlib.repr(value)}; allowed: class numbers from 0 to "
                f"{MAX_CLASS_NUMBER - 1}, or class names"
            )
    top = max((v for v in values if v is not None), default=-1)
    if names is None:
        return [str(i) for i in range(top + 1)]
    if top >= len(names):
        raise UserError(
            f"{table.path}: column {column!r} holds class {top}, its metadata names {len(names)} classes (0 to "
            f"{len(names) - 1}); mend the metadata or the labels"
        )
    return list(names)


def _samples(
    table: _Table, labels: list[Any], number: dict[str, int], split: str | None
) -> list[Sample]:
    samples = []
    row = 0
    for group in range(table.file.num_row_groups):
        for at in range(table.file.metadata.row_group(group).num_rows):
            value = labels[row]
            label = number[value] if isinstance(value, str) else value
            known = None if label is None or label < 0 else int(label)
            read = partial(table.picture, group, at)
            origin = f"{legible(table.path.name)}:{row}"
            samples.append(
                Sample(origin, read, known, split or ("train" if known is None else None))
            )
            row += 1
    return samples
