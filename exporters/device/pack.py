"""A pack of candidate networks: its manifest, and all of them measured in interleaved rounds on this device."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import contents, timing
from .actions import Result, check_threads, device_machine
from .errors import UserError
from .runtimes import LoadedModel, load_model, select_runtime

ROUNDS = 20  # shuffled, so that a drift of the device affects all networks alike


@dataclass(frozen=True)
class Pack:
    """The opened folder; `models` are the manifest's entries, x (N, 3, S, S) the images they run."""

    root: Path
    name: str
    sha256: str  # of the manifest
    precision: str
    image_size: int
    models: list[dict[str, Any]]
    left_out: list[dict[str, Any]]
    x: NDArray[np.float32]

    @classmethod
    def open(cls, root: Path) -> Pack:
        """Read the manifest and check every file by it. Raises UserError: missing, damaged, no pack."""
        manifest, sha256 = contents.read_manifest(root, contents.PACK_SCHEMA)
        try:
            files = contents.files_of(manifest)
            for model in manifest["models"]:
                contents.one_of(model["file"], files)
            precision = contents.one_of(manifest["precision"], contents.PRECISIONS)
            facts = (
                contents.text(manifest["name"]),
                sha256,
                precision,
                int(manifest["image_size"]),
            )
            lists = (list(manifest["models"]), list(manifest["left_out"]))
            contents.one_of(contents.INPUTS, files)
        except contents.NOT_A_MANIFEST as error:
            raise contents.damaged(root, error) from None
        contents.check_files(root, files)
        x = np.load(root / contents.INPUTS, allow_pickle=False)
        return cls(root, *facts, *lists, x)


@dataclass
class Running:
    """One network of the pack: loaded and warmed up with the blocks measured so far, or the reason why not."""

    entry: dict[str, Any]
    model: LoadedModel | None = None
    reason: str | None = None
    inputs: Iterator[NDArray[np.float32]] = field(default_factory=lambda: iter(()))
    load_ms: float | None = None
    first_ms: float | None = None
    stable: bool = True
    blocks: list[timing.Block] = field(default_factory=list)


def bench_all(pack: Pack, args: argparse.Namespace) -> Result:
    """Measure every network, batch 1. Raises UserError: a runtime is missing, no network runs."""
    name, library = select_runtime(args.runtime)
    check_threads(name, args.threads)
    if args.precision not in (None, pack.precision):
        raise UserError(
            f"--precision: got {args.precision}; expected {pack.precision}, that of this pack; leave it out"
        )
    threads = args.threads or 1
    networks = [_load(pack, entry, name, library, threads, args.cache) for entry in pack.models]
    running = [one for one in networks if one.model is not None]
    if not running:
        raise UserError(f"{pack.root}: no network of this pack runs here: {networks[0].reason}")
    for order in timing.schedule(len(running), ROUNDS):
        for i in order:
            one = running[i]
            assert one.model is not None
            one.blocks.append(timing.run_block(one.model.run, one.inputs, args.seconds / ROUNDS))
    rows = [_row(one, None if name == "trt" else threads) for one in networks]
    rows += [{**entry, **NOT_MEASURED, "size_mb": None} for entry in pack.left_out]
    document = {
        "schema": "cakd.pack-bench/1",
        "pack": {"name": pack.name, "manifest_sha256": pack.sha256},
        "runtime": next(one.model.runtime for one in running if one.model),
        "precision": pack.precision,
        "image_size": pack.image_size,
        "threads": threads,
        "rows": rows,
        "machine": device_machine(),
    }
    return Result([_line(row) for row in rows], document)


NOT_MEASURED: dict[str, Any] = {
    "status": "skipped",
    "precision": None,
    "wall_ms": {**dict.fromkeys(("p50", "p90", "p99", "min")), "n": 0, "p50_ci": None},
    "cpu_ms": {"p50": None},
    "load_ms": None,
    "first_ms": None,
    "flags": [],
}


def _load(
    pack: Pack, entry: dict[str, Any], name: str, library: Any, threads: int, cache: Path | None
) -> Running:
    """Load one network, run it once and warm it up."""
    began = time.perf_counter()
    try:
        path = pack.root / entry["file"]
        model = load_model(name, library, path, pack.precision, threads, cache)
        seconds = time.perf_counter() - began - (model.build_seconds or 0)
        inputs = timing.cycle_inputs(timing.batched_inputs(pack.x, 1))
        began = time.perf_counter()
        model.run(next(inputs))
        first = time.perf_counter() - began
        stable = timing.warm_up(model.run, inputs).stable
    except UserError as error:
        return Running(entry, reason=str(error))
    load_ms, first_ms = timing.significant(1e3 * seconds), timing.significant(1e3 * first)
    return Running(entry, model, None, inputs, load_ms, first_ms, stable)


def _row(one: Running, threads: int | None) -> dict[str, Any]:
    """The manifest's entry with the times."""
    entry = {key: value for key, value in one.entry.items() if key != "file"}
    if one.model is None:
        return {**entry, **NOT_MEASURED, "reason": one.reason}
    calls = timing.Block.join(one.blocks)
    share = sum(calls.cpu_ms) / sum(calls.wall_ms)
    flags = timing.noise_flags(share, one.stable, threads)
    return {
        **entry,
        "status": "measured",
        "reason": None,
        "precision": one.model.computes_in(),
        "wall_ms": {
            **timing.percentiles(calls.wall_ms),
            "p50_ci": timing.median_interval([block.wall_ms for block in one.blocks]),
        },
        "cpu_ms": {"p50": timing.significant(float(np.median(calls.cpu_ms)))},
        "load_ms": one.load_ms,
        "first_ms": one.first_ms,
        "flags": ["NOISY", *flags] if flags else [],
    }


def _line(row: dict[str, Any]) -> str:
    """A network in a line."""
    if row["status"] != "measured":
        return f"{row['name']}: skipped: {row['reason']}"
    low, high = row["wall_ms"]["p50_ci"]
    noise = f"; {', '.join(row['flags'])}" if row["flags"] else ""
    return f"{row['name']}: p50 {row['wall_ms']['p50']:g} ms ({low:g} to {high:g}){noise}"
