"""Shards: safetensors files of records, each record with a checksum."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError
from pipeline.models.probe import TeacherSpec
from pipeline.store.encoding import DTYPES

SAFETENSORS = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I8": torch.int8,
    "I64": torch.int64,
}
NAMES = {dtype: name for name, dtype in SAFETENSORS.items()}
WORD = 8  # bytes of a word of the checksum
CHECKSUM, FEATURES_CHECKSUM = "checksum", "features_checksum"
ANSWER = ("logits", "view_hash")  # what the first covers; the second covers every other field


@dataclass(frozen=True)
class Field:
    """Type and shape of one field of a record."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @cached_property
    def bytes(self) -> int:
        """Bytes per record."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def padded(self) -> int:
        """Bytes per record, rounded up to whole words."""
        return -(-self.bytes // WORD) * WORD

    def described(self) -> list[Any]:
        """Convert to JSON: safetensors' name of the dtype, and the shape."""
        return [NAMES[self.dtype], list(self.shape)]


Fields = dict[str, Field]


def layout_fields(layout: str, dtype: str, spec: TeacherSpec, classes: int) -> Fields:
    """List the fields of a record.

    block_input: x (P+N, D), which is x_L, or the final features of a teacher without Q, K, V. qkvh: qkv
    (N, 3, H, d) and h (N, D). logits: none of them. int8: beside each a scale per channel. With features also
    features_checksum (). Always: logits (K,), view_hash () and checksum (), over these two.
    """
    patches = spec.grid[0] * spec.grid[1]
    shapes: dict[str, tuple[int, ...]] = {}
    if layout == "block_input":
        shapes = {"x": (spec.prefix + patches, spec.width)}
    elif layout == "qkvh":
        head = (3, spec.n_heads, spec.width // spec.n_heads)
        shapes = {"qkv": (patches, *head), "h": (patches, spec.width)}
    fields = {name: Field(DTYPES[dtype], shape) for name, shape in shapes.items()}
    if dtype == "int8":
        fields |= {f"{n}_scale": Field(torch.float32, s[1:]) for n, s in shapes.items()}
    fields["logits"] = Field(torch.float32, (classes,))
    checks = [CHECKSUM, *([FEATURES_CHECKSUM] if shapes else [])]
    return fields | {n: Field(torch.int64, ()) for n in ("view_hash", *checks)}


def record_bytes(fields: Fields) -> int:
    """Return the bytes of a record, all fields together."""
    return sum(field.bytes for field in fields.values())


def check_disk_space(folder: Path, needed: int) -> int:
    """Return the free bytes on the disk of `folder`. Raises UserError: fewer than needed."""
    free = shutil.disk_usage(nearest_existing(folder)).free
    if needed > free:
        raise UserError(
            f"{folder}: disk space: got {free / 1e6:,.0f} MB; expected {needed / 1e6:,.0f} MB for the feature "
            "cache; free space, lower cache.views, or set cache.mode: off"
        )
    return free


def nearest_existing(path: Path) -> Path:
    """Return the path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.resolve().parents) if p.exists())


def word_sums(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """Sum the 64-bit words of each row, wrapping: (B, bytes) uint8 of whole words -> (B,)."""
    sums: NDArray[np.int64] = np.add.reduce(rows.view(np.int64), axis=1)
    return sums


def covered(fields: Iterable[str]) -> dict[str, list[str]]:
    """Which of these fields each checksum covers; there are two, so that logits are read without the features."""
    names = [name for name in fields if name not in (CHECKSUM, FEATURES_CHECKSUM)]
    features = [name for name in names if name not in ANSWER]
    return {CHECKSUM: list(ANSWER)} | ({FEATURES_CHECKSUM: features} if features else {})


def checksums(tensors: dict[str, Tensor], first: int) -> dict[str, Tensor]:
    """Compute the checksums (n,) int64 of records numbered from `first`: the wrapping sum of words and number.

    Any flipped bit changes it, and so does a record in another record's position. A sum, because it runs at the
    speed of memory for every record that is read.
    """
    sums = {}
    for checksum, names in covered(tensors).items():
        total = np.arange(first, first + len(tensors["view_hash"]), dtype=np.int64)
        for name in names:
            rows = tensors[name].contiguous().reshape(len(total), -1).view(torch.uint8).numpy()
            total += word_sums(np.pad(rows, ((0, 0), (0, -rows.shape[1] % WORD))))
        sums[checksum] = torch.from_numpy(total)
    return sums


def save(path: Path, tensors: dict[str, Tensor], first: int) -> None:
    """Write a shard whose first record has number `first`, atomically. Raises UserError: disk full, read-only."""
    record_fields = {name: tensor.contiguous() for name, tensor in tensors.items()}
    record_fields |= checksums(record_fields, first)
    try:
        with atomic(path) as temporary:
            save_file(record_fields, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write ({error}); free space, then run again") from None


class Shard:
    """An open shard, any field of any record read by one `preadv`.

    Not memory-mapped: a file that is cut short while it is open gives a short read here, and SIGBUS there.
    """

    def __init__(self, path: Path, fields: Fields, entry: dict[str, Any], first: int) -> None:
        """Open the shard of a manifest's entry. Raises UserError: missing, another size, another header."""
        self.path, self.fields, self.first = path, fields, first
        self.records = int(entry["records"])
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise UserError(
                f"{path}: no such file; expected a shard of the feature cache; run cache again"
            ) from None
        if (size := os.fstat(self._file.fileno()).st_size) != entry["bytes"]:
            raise self.damaged(f"got {size} bytes; expected {entry['bytes']}")
        self._offsets = self._read_header()

    def _read_header(self) -> dict[str, int]:
        """Return the offset of each field in the file."""
        try:
            length = int.from_bytes(self._file.read(WORD), "little")
            if length > os.fstat(self._file.fileno()).st_size:
                raise self.damaged(
                    f"header: got a length of {length} bytes; expected less than the file"
                )
            header = json.loads(self._file.read(length))
            for name, field in self.fields.items():
                dtype, shape = field.described()
                expected = [dtype, [self.records, *shape]]
                if [header[name]["dtype"], header[name]["shape"]] != expected:
                    raise self.damaged(f"field {name}: got {header[name]}; expected {expected}")
            return {n: WORD + length + int(header[n]["data_offsets"][0]) for n in self.fields}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(f"header: not readable ({error})") from None

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def damaged(self, reason: str) -> UserError:
        """Build the error that names this shard."""
        return UserError(f"{self.path}: damaged: {reason}; run cache again")

    def read(self, name: str, record: int, buffer: memoryview) -> None:
        """Read a field of a record, numbered over the whole store, into `buffer`. Raises UserError: cut short."""
        field = self.fields[name]
        offset = self._offsets[name] + (record - self.first) * field.bytes
        try:
            got = os.preadv(self._file.fileno(), [buffer[: field.bytes]], offset)
        except OSError as error:
            raise self.damaged(f"record {record}: cannot be read ({error.strerror})") from None
        if got != field.bytes:
            raise self.damaged(f"record {record}: got {got} bytes; expected {field.bytes}")
