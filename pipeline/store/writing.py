"""Writing a store: the teacher runs over every view, shard by shard, in any number of processes.

A shard is the unit of resuming and of division between processes (`dividing`). It consists of whole write batches,
so that neither a kill nor the number of processes changes which images are in a batch together, or the bits.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import artifacts
from pipeline.data import views
from pipeline.data.prepared import Prepared, spread
from pipeline.data.resident import resident_where_it_fits
from pipeline.models import teacher
from pipeline.models.teacher import TeacherOutputs
from pipeline.store import dividing, encoding, overconfidence, policy, shards
from pipeline.store.dividing import note_of, shard_of
from pipeline.store.policy import Cache, check_layout
from pipeline.store.reading import SCHEMA, seal
from pipeline.training import compute
from pipeline.training.ranks import SINGLE_PROCESS, Ranks

MEASURE_EVERY = 8  # write batches between two measurements of the error, which costs a replay
# Rooms of pipeline/ whose code decides a record: after an edit there an unfinished store starts again.
ROOMS = ("core", "data", "models", "store", "training")
# Views for the mean and standard deviation of h per channel: 8,000 tokens at 8 x 8.
STATISTICS = 128


def write(
    cache: Cache,
    prepared: Prepared,
    live: teacher.Teacher,
    out: Path,
    work: Path,
    progress: Callable[[int], None],
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Write the store together with all processes that have this work folder; returns the manifest.

    It is at `out` when any of them returns. Resumes shard by shard. The teacher is moved to this rank's device.
    `progress` is called with the number of records that all processes have written.
    Raises UserError: a layout that does not fit the teacher, a value above float16, disk full, no such device, a
    process with other settings in the same work folder. GateFailed: an error above the gate of its dtype.
    """
    check_layout(cache, live.spec)
    policy.check_data(prepared, live.description)
    device = compute.pick_device(cache.device, "cache.device", ranks)
    prepared = resident_where_it_fits(prepared, device)
    task = Task(cache, prepared, live.to(device), device)
    settings = {
        **task.fingerprint,
        "mode": cache.mode,
        "batch": cache.batch,
        "shard_mb": cache.shard_mb,
        "device": device.type,
        "code": artifacts.code(ROOMS),
    }
    dividing.write(task, work, settings, out, progress)
    return artifacts.read_json(out / "manifest.json", SCHEMA)


class Task:
    """The content of a store to write, and its division into shards."""

    def __init__(
        self,
        cache: Cache,
        prepared: Prepared,
        live: teacher.Teacher,
        device: torch.device,
    ) -> None:
        self.cache, self.prepared, self.live, self.device = cache, prepared, live, device
        self.fingerprint = policy.fingerprint(cache, prepared, live.description)
        self.fields = shards.layout_fields(
            cache.layout, cache.dtype, live.spec, len(prepared.classes)
        )
        self.rows = prepared.rows("train")
        self.total = len(self.rows) * cache.views if cache.mode == "on" else 0
        in_batch = shards.record_bytes(self.fields) * cache.batch
        self.per_shard = max(1, cache.shard_mb * 1_000_000 // in_batch) * cache.batch

    @property
    def shard_count(self) -> int:
        """Number of shards of the whole store."""
        return -(-self.total // self.per_shard)

    def records_of(self, number: int) -> NDArray[np.int64]:
        """Return the record numbers of one shard."""
        start = number * self.per_shard
        return np.arange(start, min(start + self.per_shard, self.total))

    def view(self, records: NDArray[np.int64]) -> Tensor:
        """Render the views (B, 3, S, S) uint8 of records (B,)."""
        cache, rows = self.cache, self.rows[records // self.cache.views]
        return views.view_batch(
            self.prepared.images, cache.geometry, cache.seed, rows, records % cache.views, self.rows
        )

    def make(
        self, number: int, progress: Callable[[int], None]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Compute the content of one shard, and the largest measured errors."""
        return _make_shard(self, self.records_of(number), progress)

    def save(
        self, folder: Path, number: int, tensors: dict[str, Tensor], errors: dict[str, float]
    ) -> None:
        """Write one shard into the work folder, and then its note."""
        _save_shard(self, folder, number, tensors, errors)

    def entries(self, folder: Path) -> list[dict[str, Any]]:
        """Read the notes of all shards in the work folder."""
        return [artifacts.read_json(note_of(folder, n)) for n in range(self.shard_count)]

    def manifest(self, folder: Path) -> dict[str, Any]:
        """Build the sealed manifest from the finished shards in the work folder."""
        cache, spec = self.cache, self.live.spec
        entries = self.entries(folder)
        mean, std = _statistics(self)
        return seal(
            {
                "schema": SCHEMA,
                "mode": cache.mode,
                "dtype": cache.dtype,
                "layout": cache.layout,
                "views": cache.views,
                "write_batch": cache.batch,
                "images": len(self.rows),
                "records": self.total,
                "bytes_per_view": sum(e["bytes"] for e in entries) / self.total if entries else 0,
                "fields": {name: field.described() for name, field in self.fields.items()},
                "error": encoding.worst([e["error"] for e in entries if e["error"]]),
                "r12": overconfidence.r12(entries),
                "n_heads": spec.n_heads,
                "no_attention": spec.no_attention,
                "width": spec.width,
                "h_mean": mean,
                "h_std": std,
                "fingerprint": self.fingerprint,
                "shards": entries,
                "provenance": artifacts.provenance(asdict(cache)),
            }
        )


def _make_shard(
    task: Task, records: NDArray[np.int64], progress: Callable[[int], None]
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Compute the fields (n, ...) of these records without checksum, and the largest measured errors."""
    columns: dict[str, list[Tensor]] = {}
    errors: list[dict[str, float]] = []
    for start in range(0, len(records), task.cache.batch):
        batch_records = records[start : start + task.cache.batch]
        batch = task.view(batch_records)
        x, exact = task.live.look(batch.to(task.device))
        stored, replayed = _stored(
            task, x, exact, measure=start % (MEASURE_EVERY * task.cache.batch) == 0
        )
        if replayed is not None:
            errors.append(encoding.relative_errors(replayed, exact))
            encoding.check_gate(
                errors[-1], task.cache.dtype, "cache.dtype", encoding.finer(task.cache.dtype)
            )
        encoding.largest_magnitude(exact.logits)
        stored["logits"] = exact.logits
        stored["view_hash"] = torch.from_numpy(views.view_hashes(batch).astype(np.int64))
        for name, tensor in stored.items():
            columns.setdefault(name, []).append(tensor.cpu())
        progress(start + len(batch_records))
    return {k: torch.cat(v) for k, v in columns.items()}, encoding.worst(errors)


def _stored(
    task: Task, x: Tensor, exact: TeacherOutputs, measure: bool
) -> tuple[dict[str, Tensor], TeacherOutputs | None]:
    """Encode the features of a batch; with `measure` also the outputs that a training will get from them."""
    features = {}
    if task.cache.layout == "block_input":
        features = {"x": x}
    elif task.cache.layout == "qkvh":
        features = {"qkv": exact.attention_inputs, "h": exact.tokens}
    encoded = {name: encoding.encode(value, task.cache.dtype) for name, value in features.items()}
    stored = {name: tensor for name, (tensor, _) in encoded.items()}
    stored |= {f"{name}_scale": scale for name, (_, scale) in encoded.items() if scale is not None}
    if not measure:
        return stored, None
    decoded = {name: encoding.decode(*pair) for name, pair in encoded.items()}
    if "x" in decoded:
        return stored, task.live.tail(decoded["x"])
    return stored, TeacherOutputs(decoded.get("qkv"), decoded.get("h"), exact.logits)


def _save_shard(
    task: Task, folder: Path, number: int, tensors: dict[str, Tensor], errors: dict[str, float]
) -> None:
    path = shard_of(folder, number)
    shards.save(path, tensors, first=int(task.records_of(number)[0]))
    artifacts.write_json(
        note_of(folder, number),
        {
            "file": path.name,
            "records": len(tensors["logits"]),
            "bytes": path.stat().st_size,
            "sha256": artifacts.sha256(path),
            "error": errors,
            "ratios": overconfidence.ratios(tensors["logits"]),
        },
    )


def _statistics(task: Task) -> tuple[list[float], list[float]]:
    """Compute mean and standard deviation of h per channel over view 0 of evenly spaced images.

    From the running teacher, so that they are the same with `cache.mode` on and off.
    """
    cache = task.cache
    rows = spread(task.rows, STATISTICS)
    tokens = []
    for start in range(0, len(rows), cache.batch):
        batch_rows = rows[start : start + cache.batch]
        batch = views.view_batch(
            task.prepared.images,
            cache.geometry,
            cache.seed,
            batch_rows,
            np.zeros_like(batch_rows),
            task.rows,
        )
        tokens.append(task.live(batch.to(task.device)).tokens.flatten(0, 1).cpu())
    h = torch.cat(tokens).double()
    return h.mean(0).tolist(), h.std(0).clamp(min=1e-6).tolist()
