"""A shard: one safetensors file of records, each field read by itself, each record with a checksum."""

from __future__ import annotations

import json
import math
import os
import shutil
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


@dataclass(frozen=True)
class Field:
    """What one record holds under one name."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @cached_property
    def bytes(self) -> int:
        """Bytes of a record."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def padded(self) -> int:
        """Bytes up to the next whole word."""
        return -(-self.bytes // WORD) * WORD

    def described(self) -> list[Any]:
        """The JSON-able form: safetensors' name of the dtype, and the shape."""
        return [NAMES[self.dtype], list(self.shape)]


Fields = dict[str, Field]


def layout_fields(layout: str, dtype: str, found: TeacherSpec, classes: int) -> Fields:
    """The fields of a record.

    block_input: x (P+N, D): x_L, or of a teacher without Q, K, V its final features. qkvh: qkv (N, 3, H, d) and
    h (N, D). int8: a scale a channel beside each.
    Always: logits (K,), view_hash () and checksum ().
    """
    patches = found.grid[0] * found.grid[1]
    shapes: dict[str, tuple[int, ...]] = {"x": (found.prefix + patches, found.width)}
    if layout == "qkvh":
        head = (3, found.n_heads, found.width // found.n_heads)
        shapes = {"qkv": (patches, *head), "h": (patches, found.width)}
    fields = {name: Field(DTYPES[dtype], shape) for name, shape in shapes.items()}
    if dtype == "int8":
        fields |= {f"{n}_scale": Field(torch.float32, s[1:]) for n, s in shapes.items()}
    fields["logits"] = Field(torch.float32, (classes,))
    return fields | {n: Field(torch.int64, ()) for n in ("view_hash", "checksum")}


def record_bytes(fields: Fields) -> int:
    """Bytes of a record, all fields together."""
    return sum(field.bytes for field in fields.values())


def check_disk_space(folder: Path, needed: int) -> int:
    """Free bytes where `folder` is to stand. Raises UserError: fewer than needed."""
    free = shutil.disk_usage(standing(folder)).free
    if needed > free:
        raise UserError(
            f"{folder}: the store needs {needed / 1e6:,.0f} MB more, {free / 1e6:,.0f} MB are free; free space, "
            "lower cache.views, or set cache.mode: off"
        )
    return free


def standing(path: Path) -> Path:
    """The path, or the nearest folder above it that exists."""
    return next(p for p in (path, *path.resolve().parents) if p.exists())


def word_sums(rows: NDArray[np.uint8]) -> NDArray[np.int64]:
    """(B, bytes) uint8, rows of whole words -> (B,) the sum of each row's 64-bit words, wrapping."""
    sums: NDArray[np.int64] = np.add.reduce(rows.view(np.int64), axis=1)
    return sums


def checksums(tensors: dict[str, Tensor], first: int) -> Tensor:
    """(n,) int64: the wrapping sum of the words of a record's fields and of its number, `first` onwards.

    Any one flipped bit changes it, and so does a record that stands where another belongs.
    """
    total = np.arange(first, first + len(tensors["view_hash"]), dtype=np.int64)
    for tensor in tensors.values():
        rows = tensor.contiguous().reshape(len(tensor), -1).view(torch.uint8).numpy()
        total += word_sums(np.pad(rows, ((0, 0), (0, -rows.shape[1] % WORD))))
    return torch.from_numpy(total)


def save(path: Path, tensors: dict[str, Tensor], first: int) -> None:
    """Write a shard whose first record is number `first`, atomically. Raises UserError: disk full, read-only."""
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    whole["checksum"] = checksums(whole, first)
    try:
        with atomic(path) as temporary:
            save_file(whole, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: cannot write ({error}); free space, then run again") from None


class Shard:
    """An open shard: any field of any record by one `preadv`, which tells a truncated file by a short read."""

    def __init__(self, path: Path, fields: Fields, entry: dict[str, Any], first: int) -> None:
        """Open the shard of a manifest's entry. Raises UserError: missing, another size, a foreign header."""
        self.path, self.fields, self.first = path, fields, first
        self.records = int(entry["records"])
        try:
            self._file = path.open("rb", buffering=0)
        except FileNotFoundError:
            raise UserError(
                f"{path}: this shard of the feature store is missing; run cache again"
            ) from None
        if os.fstat(self._file.fileno()).st_size != entry["bytes"]:
            raise self.damaged(f"it is not the {entry['bytes']} bytes written")
        self._offsets = self._read_header()

    def _read_header(self) -> dict[str, int]:
        """Where each field begins."""
        try:
            length = int.from_bytes(self._file.read(WORD), "little")
            if length > os.fstat(self._file.fileno()).st_size:
                raise self.damaged(f"its header says that it has {length} bytes")
            header = json.loads(self._file.read(length))
            for name, field in self.fields.items():
                dtype, shape = field.described()
                if header[name]["dtype"] != dtype or header[name]["shape"] != [
                    self.records,
                    *shape,
                ]:
                    raise self.damaged(f"field {name} is {header[name]}")
            return {n: WORD + length + int(header[n]["data_offsets"][0]) for n in self.fields}
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise self.damaged(f"its header is unreadable ({error})") from None

    def close(self) -> None:
        """Nothing more is read."""
        self._file.close()

    def damaged(self, why: str) -> UserError:
        """The error that names this shard."""
        return UserError(f"{self.path}: damaged, {why}; run cache again")

    def read(self, name: str, record: int, into: memoryview) -> None:
        """Read a field of a record, counted over the whole store, into `into`. Raises UserError: cut short."""
        field = self.fields[name]
        at = self._offsets[name] + (record - self.first) * field.bytes
        try:
            got = os.preadv(self._file.fileno(), [into[: field.bytes]], at)
        except OSError as error:
            raise self.damaged(f"record {record} cannot be read ({error.strerror})") from None
        if got != field.bytes:
            raise self.damaged(f"record {record} is cut short")
