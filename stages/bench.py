"""Stage bench: latency of one target's student and teacher on the exported reference images."""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from exporters.artifact.session import TARGETS, Target
from exporters.bench import compare
from exporters.bench.measure import Subject, measure_rows, save_samples
from exporters.bench.subjects import Bench, bench_document
from exporters.bench.worker import read_reference
from exporters.open import RUNTIMES
from pipeline.core import artifacts, cli, config
from pipeline.core.formats import BuildFile

MODELS = ("student", "teacher")
SEED = 0  # of the order within the rounds, and of the intervals


def subject(
    build: dict[str, Any], args: argparse.Namespace, model: str, threads: int, batch: int
) -> Subject:
    """Build the subject of one model from build.json: its artefact, or the reason why there is none."""
    target: Target = TARGETS[args.target]
    entry = build["models"][model]
    artefact = args.build_dir / (entry["artefact"] or target.artefact.format(model=model))
    skip = entry["reason"] if entry["status"] == "skipped" else None
    return Subject(
        model, artefact, target, threads, skip or RUNTIMES[target.runtime].obstacle(artefact), batch
    )


def main(args: argparse.Namespace) -> None:
    """Write `args.out` and its .npz; a model that cannot be measured here gets a row with the reason."""
    began = time.monotonic()
    params = config.load(Bench, args.params)
    built = args.build_dir / "build.json"
    build = artifacts.read(built, BuildFile)
    reference = args.export_dir / "reference.npz"
    read_reference(reference)
    subjects = [
        subject(build, args, *of)
        for of in itertools.product(MODELS, params.threads, params.batches)
    ]
    seconds = params.seconds_per_row / params.rounds
    measured = measure_rows(subjects, params.rounds, seconds, SEED, reference)
    rows = [one.row for one in measured]
    inputs = {"build": built, "reference": reference}
    used = {key: value for key, value in params.__dict__.items() if key != "enabled"}
    content = {
        "p50_ms": headline(rows),
        "pairs": compare.student_over_teacher(measured, SEED),
        "rows": rows,
    }
    save_samples(args.out.with_suffix(".npz"), measured)
    artifacts.write_json(args.out, bench_document(args.target, used, inputs, **content))
    print(f"{args.out}: p50 {', '.join(map(_summary, rows))} ({time.monotonic() - began:.0f} s)")


def headline(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Map model, threads and batch above 1 to the wall p50, for `dvc metrics show`, which skips lists."""
    measured = [r for r in rows if r["status"] == "measured"]
    return {f"{r['model']}_{r['threads']}t{_batch(r)}": r["wall_ms"]["p50"] for r in measured}


def _batch(row: dict[str, Any]) -> str:
    return f"_b{row['batch']}" if row["batch"] > 1 else ""


def _summary(row: dict[str, Any]) -> str:
    measured = f"{row['wall_ms']['p50']} ms on {row['threads']} threads"
    return f"{row['model']} {row['reason'] or measured}"


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
