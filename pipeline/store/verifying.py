"""Verification of a store: every byte against the manifest, and records against the running teacher."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.models import teacher
from pipeline.store import encoding
from pipeline.store.reading import Store, as_written, open_manifest, open_shards
from pipeline.training import compute
from pipeline.training.ranks import SINGLE_PROCESS

BATCH = 64  # records per forward pass of the teacher


def check_bytes(folder: Path) -> dict[str, Any]:
    """Hash every shard and return the manifest. Raises UserError: naming the damaged shard."""
    manifest = open_manifest(folder)
    for shard in open_shards(folder, manifest):
        shard.close()
    for entry in manifest["shards"]:
        path = folder / entry["file"]
        if (got := artifacts.sha256(path)) != entry["sha256"]:
            raise UserError(
                f"{path}: damaged: SHA-256: got {got[:12]}; expected {entry['sha256'][:12]}; run cache again"
            )
    return manifest


def verify(
    folder: Path, prepared: Prepared, teacher_path: Path, n: int
) -> dict[str, dict[str, float]]:
    """Check every byte, then `n` records against the teacher; returns max and mean relative error by tensor.

    Raises UserError: damaged, stale, or nothing stored. GateFailed: an error is above the gate of its dtype.
    """
    if n < 1:
        raise UserError(f"-n: got {n}; expected 1 record or more")
    device = compute.pick_device("auto", "verify", SINGLE_PROCESS)
    prepared = as_written(folder, prepared, device)
    store = Store(folder, prepared, teacher_path)
    if not store.cached:
        raise UserError(
            f"{folder}: got a feature cache with mode off, which has no records; set cache.mode: on and run cache"
        )
    total = check_bytes(folder)["records"]
    live = teacher.load(teacher_path).to(device)
    sample = np.sort(np.random.default_rng(0).choice(total, min(n, total), replace=False))
    train, errors = prepared.rows("train"), []
    for start in range(0, len(sample), BATCH):
        records = sample[start : start + BATCH]
        rows, ks = train[records // store.views], records % store.views
        batch = views.view_batch(prepared.images, store.geometry, store.seed, rows, ks, train)
        stored = store.read(records, device)
        views.check_hashes(batch, stored.view_hash, rows)
        tokens = stored.tokens(live.tail if store.replayed else None)
        errors.append(encoding.relative_errors(tokens, live(batch.to(device))))
        encoding.check_gate(errors[-1], store.manifest["dtype"], str(folder), "run cache again")
    worst = encoding.worst(errors)
    return {
        name: {"max": worst[name], "mean": float(np.mean([e[name] for e in errors]))}
        for name in worst
    }
