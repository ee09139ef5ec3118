"""What the runner does: verify the bundle, time it, or classify pictures."""

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
BATCH = 16  # at most so many parity inputs at once, where the batch is free


@dataclass(frozen=True)
class Result:
    """What was found: lines for people, a JSON document, and which gate it broke, if any."""

    lines: list[str]
    document: dict[str, Any]
    failure: str = ""


class Opened:
    """A precision of the bundle loaded in the runtime that was asked for, with what the loading took in ms."""

    def __init__(self, bundle: Bundle, name: str, library: Any, precision: str, args: Any) -> None:
        """Raises UserError: the bundle has no such precision, the runtime refuses it."""
        model = bundle.root / bundle.model(name, precision).file
        began = time.perf_counter()
        self.session: LoadedModel = load_model(
            name, library, model, precision, args.threads or 1, args.cache
        )
        seconds = time.perf_counter() - began - (self.session.build_seconds or 0)
        self.facts: dict[str, Any] = {
            "model": model.name,
            "runtime": self.session.runtime,
            "precision": precision,
            "threads": None if name == "trt" else args.threads or 1,
            "load_ms": timing.significant(1e3 * seconds),
            "build_s": self.session.build_seconds,
        }


def run_action(bundle: Bundle, args: argparse.Namespace) -> Result:
    """The action asked for. Raises UserError: a runtime, a precision or a picture that is not there."""
    name, library = select_runtime(args.runtime)
    _check_threads(name, args.threads)
    if args.verify:
        return _verify(bundle, name, library, args)
    opened = Opened(bundle, name, library, args.precision or "fp32", args)
    return _bench(bundle, opened, args) if args.bench else _classify(bundle, opened, args)


def _check_threads(name: str, threads: int | None) -> None:
    cores = usable_cores()
    if threads is not None and name == "trt":
        raise UserError(f"--threads {threads}: TensorRT runs on the GPU; leave it out")
    if threads is not None and not 1 <= threads <= cores:
        raise UserError(f"--threads {threads}: allowed: 1 to {cores}, the usable cores")


def _document(bundle: Bundle, kind: str, **content: Any) -> dict[str, Any]:
    """A JSON result with what it was got from and on."""
    try:
        load: float | None = round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        load = None
    return {
        "schema": f"cakd.bundle-{kind}/1",
        "bundle": {"name": bundle.name, "manifest_sha256": bundle.sha256},
        **content,
        "machine": {
            "board": _text(Path("/proc/device-tree/model")),
            "system": platform.system(),
            "arch": platform.machine(),
            "cores": usable_cores(),
            "load_1m": load,
            "python": platform.python_version(),
            "numpy": np.__version__,
        },
    }


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip(" \n\0")
    except OSError:
        return None


def _verify(bundle: Bundle, name: str, library: Any, args: argparse.Namespace) -> Result:
    """The parity inputs through every precision, or the one asked for, against the fp32 logits of the maker."""
    x, reference = bundle.parity()
    wanted = [args.precision] if args.precision else bundle.precisions(name)
    lines = [f"{len(bundle.files)} files are as the manifest {bundle.sha256[:12]} has them"]
    rows: list[dict[str, Any]] = []
    for precision in wanted:
        opened = Opened(bundle, name, library, precision, args)
        step = bundle.input_shape[0] or BATCH
        parts = [opened.session.run(x[i : i + step]) for i in range(0, len(x), step)]
        verdict, reason = parity.verify_logits(reference, np.concatenate(parts), precision)
        computed = opened.session.computes_in()
        rows.append({**opened.facts, "computes_in": computed, "verdict": verdict, "reason": reason})
        lines.append(
            f"{opened.session.runtime}, {precision} (computes in {computed}): {len(x)} inputs, "
            f"{reason}: {verdict}"
        )
    failed = [f"{row['model']}: {row['reason']}" for row in rows if row["verdict"] == "FAIL"]
    document = _document(bundle, "verify", inputs=len(x), rows=rows)
    failure = (
        f"{rows[0]['runtime']} does not compute what was shipped: {'; '.join(failed)}; "
        "try its newest version, or another --runtime"
    )
    return Result(lines, document, failure if failed else "")


def _bench(bundle: Bundle, opened: Opened, args: argparse.Namespace) -> Result:
    """Latency of the smallest batch the model takes, the parity inputs in turn."""
    x, _ = bundle.parity()
    size = bundle.input_shape[0] or 1
    inputs = timing.batched_inputs(x, size)
    began = time.perf_counter()
    opened.session.run(inputs[0])
    first_ms = timing.significant(1e3 * (time.perf_counter() - began))
    found = timing.time_calls(opened.session.run, inputs, args.seconds)
    flags = timing.noise_flags(found, opened.facts["threads"])
    row = {
        **opened.facts,
        "computes_in": opened.session.computes_in(),
        "batch": size,
        "first_ms": first_ms,
        **found,
        "flags": flags,
    }
    return Result(_told(row), _document(bundle, "bench", **row))


def _told(row: dict[str, Any]) -> list[str]:
    """A row of the bench in three lines; a fourth where it is noisy."""
    wall, warm = row["wall_ms"], row["warm_up"]
    threads = row["threads"]
    place = f"{threads} thread{'s' * (threads > 1)}" if threads else "GPU, copies included"
    built = "" if row["build_s"] is None else f", engine built in {row['build_s']:.1f} s"
    lines = [
        f"{row['model']}: {row['runtime']}, computes in {row['computes_in']}, batch {row['batch']}, {place}",
        f"wall p50 {wall['p50']:g} ms, p90 {_or_few(wall['p90'], timing.P90_FROM)}, "
        f"p99 {_or_few(wall['p99'], timing.P99_FROM)}, min {wall['min']:g} ms; "
        f"process CPU p50 {row['cpu_ms']['p50']:g} ms; {wall['n']} calls",
        f"load {row['load_ms']:g} ms, first inference {row['first_ms']:g} ms{built}; warm-up "
        f"{warm['seconds']:.2f} s, {'stable' if warm['stable'] else 'not stable'}",
    ]
    return lines + ([f"NOISY: {', '.join(row['flags'])}"] if row["flags"] else [])


def _or_few(figure: float | None, least: int) -> str:
    return f"n/a (needs {least} calls)" if figure is None else f"{figure:g} ms"


def _classify(bundle: Bundle, opened: Opened, args: argparse.Namespace) -> Result:
    """The most probable classes of each picture."""
    notes, labels = bundle.preprocessing(), bundle.labels()
    lines, rows = [], []
    for path in args.image:
        x = image.read_image(path, notes)
        if x.shape[1:] != bundle.input_shape[1:]:
            raise UserError(
                f"--image {path}: prepared as {x.shape[1:]}, the model takes {bundle.input_shape[1:]}; "
                "its preprocessing is of another model"
            )
        whole = np.repeat(x, bundle.input_shape[0] or 1, axis=0)
        answers = _top(opened.session.run(whole)[0], labels)
        told = ", ".join(f"{a['label']} {a['probability']:.3f}" for a in answers)
        lines.append(f"{path}: {told}")
        rows.append({"image": str(path), "top": answers})
    return Result(lines, _document(bundle, "image", **opened.facts, rows=rows))


def _top(logits: NDArray[np.float32], labels: list[str]) -> list[dict[str, Any]]:
    """(K,) -> the most probable classes; a class without a name is called by its number."""
    shares = np.exp(logits.astype(np.float64) - logits.max())
    shares /= shares.sum()
    best = np.argsort(-shares, kind="stable")[:TOP]
    return [
        {
            "class": int(k),
            "label": labels[k] if k < len(labels) else f"class {k}",
            "probability": round(float(shares[k]), 6),
        }
        for k in best
    ]
