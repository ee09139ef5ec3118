"""Opening a store and reading its records: by the main process, one batch ahead, into buffers used again."""

from __future__ import annotations

import reprlib
import resource
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import artifacts, config
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.models import checkpoint
from pipeline.models.teacher import TeacherOutputs, TeacherTail
from pipeline.store import policy
from pipeline.store.encoding import DTYPES, decode
from pipeline.store.shards import SAFETENSORS, Field, Fields, Shard, word_sums

SCHEMA = "cakd.store/2"
REMEDY = "run cache again"
FEATURES = {"block_input": ("x",), "qkvh": ("qkv", "h")}  # layout -> what a record must hold
SEAL = "sha256"  # the manifest's own hash, over all its other keys
OTHER_FILES = 256  # that a training has open besides
THREADS = 2  # that read: more gain nothing from a page cache, fewer leave a disk idle

RecordNumbers = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """A batch of records, decoded: features by name, float32; logits (B, K); view_hash (B,)."""

    features: dict[str, Tensor]
    logits: Tensor
    view_hash: NDArray[np.uint64]

    def to(self, slot: torch.device) -> Records:
        """The same on a device."""
        features = {name: tensor.to(slot) for name, tensor in self.features.items()}
        return replace(self, features=features, logits=self.logits.to(slot))

    def tokens(self, tail: TeacherTail | None) -> TeacherOutputs:
        """The teacher's tokens: replayed from x (B, P+N, D) by the tail, or as they were stored."""
        if tail is None:
            return TeacherOutputs(self.features["qkv"], self.features["h"], self.logits)
        replayed: TeacherOutputs = tail(self.features["x"])
        return replace(replayed, logits=self.logits)


def record_numbers(
    train: NDArray[np.int64], rows: views.Rows, view_numbers: views.Rows, n_views: int
) -> RecordNumbers:
    """Index in the training rows (ascending) times V, plus the view: records are sample-major."""
    return np.searchsorted(train, rows) * n_views + view_numbers


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """The manifest with its own hash in it."""
    bare = {key: value for key, value in manifest.items() if key != SEAL}
    return {**bare, SEAL: artifacts.digest(bare)}


def open_manifest(folder: Path) -> dict[str, Any]:
    """The manifest. Raises UserError: missing, of another version, not as it was written."""
    path = folder / "manifest.json"
    manifest = artifacts.read_json(path, SCHEMA)
    if seal(manifest) != manifest:
        raise UserError(f"{path}: damaged, it is not what was written; run cache again")
    artifacts.expect(manifest, path, REMEDY, mode=str, layout=str, dtype=str, fingerprint=dict)
    artifacts.expect(
        manifest, path, REMEDY, images=int, views=int, records=int, fields=dict, shards=list
    )
    artifacts.expect(manifest, path, REMEDY, bytes_per_view=int | float, error=dict)
    if manifest["layout"] not in FEATURES or manifest["dtype"] not in DTYPES:
        raise UserError(f"{path}: damaged, {manifest['dtype']} in {manifest['layout']}; {REMEDY}")
    for entry in manifest["shards"]:
        artifacts.expect(entry, path, REMEDY, file=str, records=int, bytes=int, sha256=str)
        inside = Path(entry["file"]).name == entry["file"] and entry["file"] not in ("", "..")
        if not inside or entry["records"] < 1:
            raise UserError(f"{path}: damaged, a shard is {reprlib.repr(entry)}; {REMEDY}")
    if sum(entry["records"] for entry in manifest["shards"]) != manifest["records"]:
        raise UserError(
            f"{path}: damaged, {manifest['records']} records are not its shards'; {REMEDY}"
        )
    return manifest


def _shape(sides: list[int]) -> tuple[int, ...]:
    """A field's shape. Raises ValueError: not of sides."""
    if not isinstance(sides, list) or not all(type(s) is int and s > 0 for s in sides):
        raise ValueError(f"of shape {sides!r}")
    return tuple(sides)


def open_shards(folder: Path, manifest: dict[str, Any]) -> list[Shard]:
    """Every shard, its size and header checked. Raises UserError naming the damaged one."""
    try:
        fields = {n: Field(SAFETENSORS[d], _shape(s)) for n, (d, s) in manifest["fields"].items()}
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{folder}: damaged, a field is {error}; {REMEDY}") from None
    needed = {*FEATURES[manifest["layout"]], "logits", "view_hash", "checksum"}
    if manifest["shards"] and not needed <= set(fields):
        raise UserError(f"{folder}: damaged, the fields are {reprlib.repr(list(fields))}; {REMEDY}")
    _allow_files(len(manifest["shards"]))
    shards, first = [], 0
    for entry in manifest["shards"]:
        shards.append(Shard(folder / entry["file"], fields, entry, first))
        first += shards[-1].records
    return shards


def _allow_files(count: int) -> None:
    """Raise the limit of open files as far as these shards need. Raises UserError: not allowed that many."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + OTHER_FILES  # twice: `verify` opens them beside a Store
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"{count} shards want {needed} open files, allowed here: {hard}; raise cache.shard_mb or `ulimit -n`"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Store:
    """An opened store: whole, and made for this teacher, these images and this policy.

    Raises UserError: missing, damaged, or stale, with the one line that differs. `asked` is the policy of
    params.yaml; None takes the store's own.
    """

    def __init__(
        self,
        folder: Path,
        prepared: Prepared,
        teacher_path: Path,
        asked: policy.Cache | None = None,
    ) -> None:
        self.manifest = open_manifest(folder)
        marks = self.manifest["fingerprint"]
        description = checkpoint.describe(teacher_path)
        now = policy.surroundings(prepared, description)
        policy.check_fingerprint(folder, marks, now | (policy.asked(asked) if asked else {}))
        policy.check_data(prepared, description)
        self.views = int(marks["views"])
        self.seed = int(marks["seed"])
        geometry = {k.split(".")[1]: v for k, v in marks.items() if k.startswith("geometry.")}
        self.geometry = config.parse(views.Geometry, geometry, f"{folder}: geometry")
        self._train = prepared.rows("train")
        self._reader = Reader(open_shards(folder, self.manifest))

    @property
    def cached(self) -> bool:
        """False where `cache.mode` is off: only the policy is here."""
        return bool(self.manifest["mode"] == "on")

    @property
    def replayed(self) -> bool:
        """True where the teacher's last block is needed to make tokens of a record."""
        return bool(self.manifest["layout"] == "block_input")

    def records(self, rows: views.Rows, ks: views.Rows) -> RecordNumbers:
        """Record numbers of view k of each image row."""
        return record_numbers(self._train, rows, ks, self.views)

    def prefetch(self, records: RecordNumbers) -> None:
        """Begin to read the records that the next `read` will ask for."""
        self._reader.begin(records)

    def read(self, records: RecordNumbers) -> Records:
        """The given records, decoded. Raises UserError: bytes that are not those written."""
        raw = self._reader.finish(records)
        features = {
            name: decode(tensor, raw.get(f"{name}_scale"))
            for name, tensor in raw.items()
            if name in ("x", "qkv", "h")
        }
        hashes = raw["view_hash"].numpy().astype(np.uint64)
        return Records(features, raw["logits"].clone(), hashes)


class Reader:
    """Fills one buffer a field with the records of a batch, on two threads, and checks every record's sum.

    The buffers are pinned where there is a GPU, and used again: what `finish` gives holds until the next `begin`.
    """

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._shards = shards
        self._fields: Fields = shards[0].fields if shards else {}
        self._starts = np.array([shard.first for shard in shards])
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self._buffers: dict[str, Tensor] = {}
        self._capacity = 0
        self._wanted: RecordNumbers | None = None
        self._filling: list[Future[None]] = []

    def begin(self, records: RecordNumbers) -> None:
        """Start to read. What an earlier `begin` asked for and nobody took is dropped, with its errors."""
        self._wanted = None
        wait(self._filling)
        if len(records) > self._capacity:
            self._allocate(len(records))
        self._wanted = records.copy()
        parts = np.array_split(np.arange(len(records)), THREADS)
        self._filling = [
            self._pool.submit(self._fill, records[part], part) for part in parts if len(part)
        ]

    def finish(self, records: RecordNumbers) -> dict[str, Tensor]:
        """The fields (B, ...) of the records, as stored; reads now what was not begun."""
        if self._wanted is None or not np.array_equal(self._wanted, records):
            self.begin(records)
        self._wanted = None
        self._settle()
        return {
            name: self._buffers[name][: len(records), : field.bytes]
            .view(field.dtype)
            .view(len(records), *field.shape)
            for name, field in self._fields.items()
        }

    def _settle(self) -> None:
        """Wait for the threads; raise what went wrong in one of them."""
        filling, self._filling = self._filling, []
        for error in [future.exception() for future in filling]:
            if error is not None:
                raise error

    def _allocate(self, count: int) -> None:
        self._capacity = count
        pin = torch.cuda.is_available()
        self._buffers = {
            name: torch.zeros(count, field.padded, dtype=torch.uint8, pin_memory=pin)
            for name, field in self._fields.items()
        }

    def _fill(self, records: RecordNumbers, slots: NDArray[np.int64]) -> None:
        """Read the records into these places of the buffers, and hold each against its checksum."""
        arrays = {name: buffer.numpy() for name, buffer in self._buffers.items()}
        owners = np.searchsorted(self._starts, records, side="right") - 1
        for slot, record, owner in zip(
            slots.tolist(), records.tolist(), owners.tolist(), strict=True
        ):
            for name, array in arrays.items():
                self._shards[owner].read(name, record, memoryview(array[slot]))
        mine = slice(slots[0], slots[-1] + 1)
        stored = arrays.pop("checksum")[mine].view(np.int64)[:, 0]
        total = records + np.add.reduce([word_sums(array[mine]) for array in arrays.values()])
        for at in np.flatnonzero(total != stored)[:1]:
            raise self._shards[owners[at]].damaged(
                f"record {records[at]} does not have the bytes written"
            )
