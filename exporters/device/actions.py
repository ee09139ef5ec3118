"""Actions of the runner: verify the bundle, measure its latency, classify images."""

from __future__ import annotations

import argparse
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import image, parity, timing
from .contents import Bundle
from .errors import UserError
from .runtimes import LoadedModel, load_model, select_runtime, usable_cores

TOP = 5
MAX_BATCH = 16  # of the parity inputs, where the batch is dynamic


@dataclass(frozen=True)
class Result:
    """Result of an action: lines to print, a JSON document, and the failed gate, if any."""

    lines: list[str]
    document: dict[str, Any]
    failure: str = ""


class Opened:
    """A precision of the bundle loaded in the requested runtime, with the load time in ms."""

    def __init__(self, bundle: Bundle, name: str, library: Any, precision: str, args: Any) -> None:
        """Raises UserError: the bundle has no such precision, the runtime rejects it."""
        file = bundle.model(name, precision)
        path, self.thresholds = bundle.root / file.file, file.thresholds
        threads = args.threads or 1
        began = time.perf_counter()
        self.model: LoadedModel = load_model(name, library, path, precision, threads, args.cache)
        seconds = time.perf_counter() - began - (self.model.build_seconds or 0)
        self.facts: dict[str, Any] = {
            "model": path.name,
            "runtime": self.model.runtime,
            "precision": precision,
            "threads": None if name == "trt" else threads,
            "load_ms": timing.significant(1e3 * seconds),
            "build_s": self.model.build_seconds,
        }


def run_action(bundle: Bundle, args: argparse.Namespace) -> Result:
    """Run the requested action. Raises UserError: a runtime, precision or image is missing."""
    name, library = select_runtime(args.runtime)
    check_threads(name, args.threads)
    if args.verify:
        return _verify(bundle, name, library, args)
    opened = Opened(bundle, name, library, args.precision or "fp32", args)
    return _bench(bundle, opened, args) if args.bench else _classify(bundle, opened, args)


def check_threads(name: str, threads: int | None) -> None:
    """Raise UserError: more threads than cores, or threads for a GPU."""
    cores = usable_cores()
    if threads is not None and name == "trt":
        raise UserError(f"--threads: got {threads}, but TensorRT runs on the GPU; leave it out")
    if threads is not None and not 1 <= threads <= cores:
        raise UserError(f"--threads: got {threads}; expected 1 to {cores}, the usable cores")


def _document(bundle: Bundle, kind: str, **content: Any) -> dict[str, Any]:
    """The JSON document of a result: the content with its bundle and machine."""
    return {
        "schema": f"cakd.bundle-{kind}/1",
        "bundle": {"name": bundle.name, "manifest_sha256": bundle.sha256},
        **content,
        "machine": device_machine(),
    }


def device_machine() -> dict[str, Any]:
    """What a result was measured on, and the load at this moment."""
    try:
        load: float | None = round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        load = None
    return {
        "board": _read_text(Path("/proc/device-tree/model")),
        "system": platform.system(),
        "arch": platform.machine(),
        "cores": usable_cores(),
        "load_1m": load,
        "python": platform.python_version(),
        "numpy": np.__version__,
    }


def _read_text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return None


def _verify(bundle: Bundle, name: str, library: Any, args: argparse.Namespace) -> Result:
    """Run the parity inputs at every precision, or the requested one, against the bundled fp32 logits."""
    x, reference = bundle.parity()
    lines = [f"{len(bundle.files)} files are as the manifest {bundle.sha256[:12]} lists them"]
    rows: list[dict[str, Any]] = []
    for precision in [args.precision] if args.precision else bundle.precisions(name):
        opened = Opened(bundle, name, library, precision, args)
        step = bundle.input_shape[0] or MAX_BATCH
        logits = [opened.model.run(x[i : i + step]) for i in range(0, len(x), step)]
        _, verdict, reason = parity.compare_logits(
            reference, np.concatenate(logits).reshape(len(x), -1), precision, opened.thresholds
        )
        computed = opened.model.computes_in()
        rows.append({**opened.facts, "computes_in": computed, "verdict": verdict, "reason": reason})
        lines.append(
            f"{opened.model.runtime}, {precision} (computes in {computed}): {len(x)} inputs, "
            f"{reason}: {verdict}"
        )
    failed = [
        f"{row['model']}: {row['verdict']}, {row['reason']}"
        for row in rows
        if row["verdict"] != "PASS"
    ]
    document = _document(bundle, "verify", inputs=len(x), rows=rows)
    failure = (
        f"{rows[0]['runtime']} is not verified by the bundled logits: {'; '.join(failed)}; "
        "try its newest version, or another --runtime"
    )
    return Result(lines, document, failure if failed else "")


def _bench(bundle: Bundle, opened: Opened, args: argparse.Namespace) -> Result:
    """Measure the smallest batch the model takes, on the parity inputs."""
    x, _ = bundle.parity()
    batch = bundle.input_shape[0] or 1
    inputs = timing.batched_inputs(x, batch)
    began = time.perf_counter()
    opened.model.run(inputs[0])
    first_ms = timing.significant(1e3 * (time.perf_counter() - began))
    times = timing.time_calls(opened.model.run, inputs, args.seconds)
    stable, threads = times["warm_up"]["stable"], opened.facts["threads"]
    row = {
        **opened.facts,
        "computes_in": opened.model.computes_in(),
        "batch": batch,
        "first_ms": first_ms,
        **times,
        "flags": timing.noise_flags(times["cpu_share"], stable, threads),
    }
    return Result(_bench_lines(row), _document(bundle, "bench", **row))


def _bench_lines(row: dict[str, Any]) -> list[str]:
    """The row in three lines; a fourth where it is noisy."""
    wall, warm, threads = row["wall_ms"], row["warm_up"], row["threads"]
    device = f"{threads} thread{'s' * (threads > 1)}" if threads else "GPU, copies included"
    built = "" if row["build_s"] is None else f", engine built in {row['build_s']:.1f} s"
    lines = [
        f"{row['model']}: {row['runtime']}, computes in {row['computes_in']}, batch {row['batch']}, {device}",
        f"wall p50 {wall['p50']:g} ms, p90 {_percentile(wall['p90'], timing.MIN_CALLS_P90)}, "
        f"p99 {_percentile(wall['p99'], timing.MIN_CALLS_P99)}, min {wall['min']:g} ms; "
        f"process CPU p50 {row['cpu_ms']['p50']:g} ms; {wall['n']} calls",
        f"load {row['load_ms']:g} ms, first inference {row['first_ms']:g} ms{built}; warm-up "
        f"{warm['seconds']:.2f} s, {'stable' if warm['stable'] else 'not stable'}",
    ]
    return lines + ([f"NOISY: {', '.join(row['flags'])}"] if row["flags"] else [])


def _percentile(ms: float | None, min_calls: int) -> str:
    return f"n/a (needs {min_calls} calls)" if ms is None else f"{ms:g} ms"


def _classify(bundle: Bundle, opened: Opened, args: argparse.Namespace) -> Result:
    """The most probable classes of each image."""
    preprocess, labels = bundle.preprocessing(), bundle.labels()
    lines, rows = [], []
    for path in args.image:
        x = image.read_image(path, preprocess)
        if x.shape[1:] != bundle.input_shape[1:]:
            raise UserError(
                f"--image {path}: prepared as {x.shape[1:]}; the model takes {bundle.input_shape[1:]}; "
                "export it with its own preprocessing metadata"
            )
        batch = np.repeat(x, bundle.input_shape[0] or 1, axis=0)
        top = _top_classes(opened.model.run(batch)[0].ravel(), labels)
        lines.append(f"{path}: " + ", ".join(f"{c['label']} {c['probability']:.3f}" for c in top))
        rows.append({"image": str(path), "top": top})
    return Result(lines, _document(bundle, "image", **opened.facts, rows=rows))


def _top_classes(logits: NDArray[np.float32], labels: list[str]) -> list[dict[str, Any]]:
    """(K,) -> the TOP most probable classes; a class without a name gets its number."""
    probabilities = np.exp(logits.astype(np.float64) - logits.max())
    probabilities /= probabilities.sum()
    return [
        {
            "class": int(k),
            "label": labels[k] if k < len(labels) else f"class {k}",
            "probability": round(float(probabilities[k]), 6),
        }
        for k in np.argsort(-probabilities, kind="stable")[:TOP]
    ]
