"""Stage bench: latency of one target's student and teacher on the exported reference pictures."""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact.session import TARGETS, Target
from exporters.bench import latency
from exporters.bench.measure import Measured, Subject, measure, save_samples
from exporters.bench.subjects import Bench, document
from exporters.bench.worker import read_reference
from exporters.trt import plan
from pipeline.core import artifacts, cli, config

BUILD_SCHEMA = "cakd.build/1"
MODELS = ("student", "teacher")


def subject(
    build: dict[str, Any], args: argparse.Namespace, model: str, threads: int, batch: int
) -> Subject:
    """What build.json says of one model: its artefact, or why there is none."""
    target: Target = TARGETS[args.target]
    made = build["models"].get(model, {"status": "skipped", "reason": "not in build.json"})
    artefact = args.build_dir / (made.get("artefact") or target.artefact.format(model=model))
    skip = made.get("reason") or "not built" if made["status"] == "skipped" else None
    if target.runtime == "trt" and skip is None:
        skip = plan.obstacle(plan.read_sidecar(artefact), artefact)
    return Subject(model, artefact, target, threads, skip, batch)


def main(args: argparse.Namespace) -> None:
    """Write `args.out` and its .npz; a model that cannot be measured here is a row with its reason."""
    began = time.monotonic()
    params = config.load(Bench, args.params)
    built = args.build_dir / "build.json"
    build = artifacts.read_json(built, BUILD_SCHEMA)
    reference = args.export_dir / "reference.npz"
    read_reference(reference)
    subjects = [
        subject(build, args, *of)
        for of in itertools.product(MODELS, params.threads, params.batches)
    ]
    seconds = params.seconds_per_row / params.rounds
    found = measure(subjects, params.rounds, seconds, params.seed, reference)
    rows = [one.row for one in found]
    inputs = {"build": built, "reference": reference}
    used = {key: value for key, value in params.__dict__.items() if key != "enabled"}
    content = {"p50_ms": headline(rows), "pairs": pairs(found, params.seed), "rows": rows}
    save_samples(args.out.with_suffix(".npz"), found)
    artifacts.write_json(args.out, document(args.target, used, inputs, **content))
    print(f"{args.out}: p50 {', '.join(map(_said, rows))} ({time.monotonic() - began:.0f} s)")


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Wall p50 by model, thread count and batch above 1, for `dvc metrics show`, which passes lists over."""
    measured = [r for r in rows if r["status"] == "measured"]
    return {f"{r['model']}_{r['threads']}t{_batch(r)}": r["wall_ms"]["p50"] for r in measured}


def _batch(row: dict[str, Any]) -> str:
    return f"_b{row['batch']}" if row["batch"] > 1 else ""


def pairs(found: Sequence[Measured], seed: int) -> list[dict[str, Any]]:
    """Student over teacher where both ran at the fewest threads, batch by batch, paired round by round.

    By CPU time; on a GPU by the engine's own. One process a side: what two processes differ by is not in it.
    """
    fewest = min(one.row["threads"] for one in found)
    sides = {
        (one.row["model"], one.row["batch"]): one
        for one in found
        if one.measured and one.row["threads"] == fewest
    }
    rows = []
    for (model, batch), student in sides.items():
        teacher = sides.get(("teacher", batch))
        if model != "student" or teacher is None:
            continue
        clock = "engine" if student.row["engine_ms"] else "cpu"
        ratio = latency.paired(_medians(student, clock), _medians(teacher, clock), seed)
        rows.append(
            {
                "target": student.row["target"],
                "threads": fewest,
                "batch": batch,
                "candidate": "student",
                "baseline": "teacher",
                "clock": clock,
                "ratio": vars(ratio),
            }
        )
    return rows


def _medians(one: Measured, clock: str) -> list[list[float]]:
    """(processes, rounds): the median of each block by that clock, in ms."""
    return [[float(np.median(getattr(b, f"{clock}_ms"))) for b in p] for p in one.processes]


def _said(row: dict[str, Any]) -> str:
    figure = f"{row['wall_ms']['p50']} ms on {row['threads']} threads"
    return f"{row['model']} {row['reason'] or figure}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.bench", description=__doc__)
    parser.add_argument("export_dir", type=Path, help="artifacts/export")
    parser.add_argument("build_dir", type=Path, help="artifacts/build/<target>")
    parser.add_argument(
        "out", type=Path, help="reports/bench/<target>.json; every call beside it as .npz"
    )
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
