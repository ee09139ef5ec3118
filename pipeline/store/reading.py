"""Opening a store and reading its records, one batch ahead, into reused buffers."""

from __future__ import annotations

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
from pipeline.core.validation import schema_name
from pipeline.data import views
from pipeline.data.pixels import Rows
from pipeline.data.prepared import Prepared
from pipeline.data.resident import resident
from pipeline.models import checkpoint
from pipeline.models.teacher import TeacherOutputs, TeacherTail
from pipeline.store import policy
from pipeline.store.encoding import decode
from pipeline.store.manifest import Manifest
from pipeline.store.shards import (
    CHECKSUM,
    SAFETENSORS,
    Field,
    Fields,
    Shard,
    covered,
    word_sums,
)

SCHEMA = schema_name(Manifest)
REMEDY = "run cache again"
SEAL = "sha256"  # key of the manifest: its hash, over all other keys
OTHER_FILES = 256  # open files of a training beside the shards
HASHES = "view_hash"  # the field that is compared on the CPU
CPU = torch.device("cpu")
THREADS = 2  # of the reader: more gain nothing from a page cache, fewer leave a disk idle

RecordNumbers = NDArray[np.int64]


@dataclass(frozen=True)
class Records:
    """A batch of records, decoded: features by name, float32; logits (B, K); view_hash (B,)."""

    features: dict[str, Tensor]
    logits: Tensor
    view_hash: NDArray[np.uint64]

    def tokens(self, tail: TeacherTail | None) -> TeacherOutputs:
        """Return the teacher's outputs: replayed from x (B, P+N, D) by the tail, or those that were read."""
        if tail is None:
            return TeacherOutputs(self.features.get("qkv"), self.features.get("h"), self.logits)
        replayed: TeacherOutputs = tail(self.features["x"])
        return replace(replayed, logits=self.logits)


def record_numbers(
    train: NDArray[np.int64], rows: Rows, view_numbers: Rows, n_views: int
) -> RecordNumbers:
    """Number the records, sample-major: index of a row in `train` (ascending) times V, plus the view."""
    return np.searchsorted(train, rows) * n_views + view_numbers


def seal(manifest: dict[str, Any]) -> dict[str, Any]:
    """Add the manifest's own hash to it."""
    bare = {key: value for key, value in manifest.items() if key != SEAL}
    return {**bare, SEAL: artifacts.digest(bare)}


def open_manifest(folder: Path) -> dict[str, Any]:
    """Read the manifest. Raises UserError: missing, of another version, changed after it was written."""
    path = folder / "manifest.json"
    manifest = artifacts.read_json(path, SCHEMA)
    if seal(manifest) != manifest:
        raise UserError(
            f"{path}: damaged: {SEAL}: got {manifest.get(SEAL)!r}; expected the hash of its content; {REMEDY}"
        )
    return artifacts.check(manifest, Manifest, path, REMEDY)


def as_written(folder: Path, prepared: Prepared, device: torch.device) -> Prepared:
    """Return the prepared images with their squares on the device, where the store's views were rendered there."""
    if device.type == "cpu":
        return prepared
    backend = open_manifest(folder)["fingerprint"]["view_backend"]
    return resident(prepared, device) if backend == views.resident_backend(device) else prepared


def open_shards(folder: Path, manifest: dict[str, Any]) -> list[Shard]:
    """Open every shard and check its size and header. Raises UserError: naming the damaged one."""
    fields = {n: Field(SAFETENSORS[d], tuple(s)) for n, (d, s) in manifest["fields"].items()}
    _allow_files(len(manifest["shards"]))
    shards, first = [], 0
    for entry in manifest["shards"]:
        shards.append(Shard(folder / entry["file"], fields, entry, first))
        first += shards[-1].records
    return shards


def _allow_files(count: int) -> None:
    """Raise the soft limit of open files to what these shards need. Raises UserError: above the hard limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = 2 * count + OTHER_FILES  # twice: `verify` opens them beside a Store
    if hard != resource.RLIM_INFINITY and needed > hard:
        raise UserError(
            f"open files: got a limit of {hard}; expected {needed} for {count} shards; raise cache.shard_mb or "
            "`ulimit -n`"
        )
    if soft != resource.RLIM_INFINITY and needed > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))


class Store:
    """An opened store that fits this teacher, these images and this policy.

    `requested` is the policy of params.yaml; None takes the store's own. `features` False reads logits only.
    Raises UserError: missing, damaged, or stale, with the line of the fingerprint that differs.
    """

    def __init__(
        self,
        folder: Path,
        prepared: Prepared,
        teacher_path: Path,
        requested: policy.Cache | None = None,
        features: bool = True,
    ) -> None:
        self.manifest = open_manifest(folder)
        fingerprint = self.manifest["fingerprint"]
        description = checkpoint.describe(teacher_path)
        current = policy.surroundings(prepared, description)
        policy.check_fingerprint(
            folder, fingerprint, current | (policy.policy_lines(requested) if requested else {})
        )
        policy.check_data(prepared, description)
        self.views = int(fingerprint["views"])
        self.seed = int(fingerprint["seed"])
        geometry = {k.split(".")[1]: v for k, v in fingerprint.items() if k.startswith("geometry.")}
        self.geometry = config.parse(views.Geometry, geometry, f"{folder}: geometry")
        self._train = prepared.rows("train")
        self._features = features and self.manifest["layout"] != "logits"
        self._reader = Reader(open_shards(folder, self.manifest), self._features)

    @property
    def cached(self) -> bool:
        """Whether it has records; with `cache.mode: off` it has only the policy."""
        return bool(self.manifest["mode"] == "on")

    @property
    def replayed(self) -> bool:
        """Whether the teacher's last block is needed to compute its outputs from a record."""
        return self._features and bool(self.manifest["layout"] == "block_input")

    def records(self, rows: Rows, ks: Rows) -> RecordNumbers:
        """Return the record numbers of view k of each image row."""
        return record_numbers(self._train, rows, ks, self.views)

    def prefetch(self, records: RecordNumbers) -> None:
        """Start reading the records of the next `read`."""
        self._reader.begin(records)

    def read(self, records: RecordNumbers, device: torch.device = CPU) -> Records:
        """Read records, and decode them on `device`. Raises UserError: bytes that are not those written."""
        raw = self._reader.finish(records, device)
        features = {
            name: decode(tensor, raw.get(f"{name}_scale"))
            for name, tensor in raw.items()
            if name in ("x", "qkv", "h")
        }
        hashes = raw[HASHES].numpy().astype(np.uint64)
        return Records(features, raw["logits"].clone(), hashes)


class Reader:
    """Reads the records of a batch into one buffer per field, on two threads, and checks every checksum.

    The buffers are reused: what `finish` returns on the CPU is valid until the next `begin`. Where there is a GPU
    they are pinned and copied without a wait; the threads wait for the copy before they write again.
    """

    def __init__(self, shards: Sequence[Shard], features: bool = True) -> None:
        self._shards = shards
        stored: Fields = shards[0].fields if shards else {}
        self._covered = {
            checksum: names
            for checksum, names in covered(stored).items()
            if features or checksum == CHECKSUM
        }
        names_read = {
            name for checksum, names in self._covered.items() for name in (checksum, *names)
        }
        self._fields: Fields = {name: field for name, field in stored.items() if name in names_read}
        self._starts = np.array([shard.first for shard in shards])
        self._pool = ThreadPoolExecutor(THREADS, thread_name_prefix="store")
        self._buffers: dict[str, Tensor] = {}
        self._capacity = 0
        self._pending: RecordNumbers | None = None
        self._filling: list[Future[None]] = []
        self._copied: torch.cuda.Event | None = None  # when the last copy to a GPU has ended

    def begin(self, records: RecordNumbers) -> None:
        """Start reading. Records of an earlier `begin` that were not finished are dropped, with their errors."""
        self._pending = None
        wait(self._filling)  # its threads still write to the buffers
        if len(records) > self._capacity:
            self._allocate(len(records))
        self._pending = records.copy()
        shares = np.array_split(np.arange(len(records)), THREADS)
        self._filling = [
            self._pool.submit(self._fill, records[share], share) for share in shares if len(share)
        ]

    def finish(self, records: RecordNumbers, device: torch.device = CPU) -> dict[str, Tensor]:
        """Return the fields (B, ...) of the records as stored; reads them now where `begin` did not.

        On `device`, but for the hashes of the views.
        """
        if self._pending is None or not np.array_equal(self._pending, records):
            self.begin(records)
        self._pending = None
        self._settle()
        buffers = {name: buffer[: len(records)] for name, buffer in self._buffers.items()}
        if device.type != "cpu":
            needed = {*buffers} - {*self._covered, HASHES}
            copies = {name: buffers[name].to(device, non_blocking=True) for name in needed}
            buffers |= copies
            self._copied = torch.cuda.Event()
            self._copied.record(torch.cuda.current_stream(device))
        return {
            name: buffers[name][:, : field.bytes].view(field.dtype).view(len(records), *field.shape)
            for name, field in self._fields.items()
        }

    def _settle(self) -> None:
        """Wait for the threads and raise the first error of one of them."""
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
        """Read the records into these slots of the buffers and check their checksums."""
        if self._copied is not None:
            self._copied.synchronize()
        arrays = {name: buffer.numpy() for name, buffer in self._buffers.items()}
        owners = np.searchsorted(self._starts, records, side="right") - 1
        for slot, record, owner in zip(
            slots.tolist(), records.tolist(), owners.tolist(), strict=True
        ):
            for name, array in arrays.items():
                self._shards[owner].read(name, record, memoryview(array[slot]))
        share = slice(slots[0], slots[-1] + 1)
        for checksum, names in self._covered.items():
            stored = arrays[checksum][share].view(np.int64)[:, 0]
            total = records + np.add.reduce([word_sums(arrays[name][share]) for name in names])
            for index in np.flatnonzero(total != stored)[:1]:
                raise self._shards[owners[index]].damaged(
                    f"record {records[index]}: {checksum}: got {total[index]}; expected {stored[index]}"
                )
