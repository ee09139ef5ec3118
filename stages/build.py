"""Stage build: one target's artefacts for student and teacher, with their parity against torch."""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from exporters.artifact.reference import Exported
from exporters.artifact.session import TARGETS
from exporters.build import Build, build_model, failures
from pipeline.core import artifacts, cli, config
from pipeline.core.atomic import atomic_dir
from pipeline.core.errors import GateFailed
from pipeline.core.machine import machine

MODELS = ("student", "teacher")
INPUTS = ("student.onnx", "teacher.onnx", "reference.npz", "calibration.npy")


def main(args: argparse.Namespace) -> None:
    """Write `args.out`: artefacts, build.json, parity.json. Raises GateFailed: fp32 parity, after writing."""
    began = time.monotonic()
    params = config.load(Build, args.params)
    exported = Exported.open(args.export_dir)
    models: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    inputs = {Path(name).stem: args.export_dir / name for name in INPUTS}
    common = {
        "target": args.target,
        "machine": machine(),
        "provenance": artifacts.provenance(params.__dict__, **inputs),
    }
    with atomic_dir(args.out) as folder:
        for model in MODELS:
            models[model], parity_rows = build_model(
                TARGETS[args.target], model, exported, folder, params
            )
            rows += parity_rows
        artifacts.write_json(
            folder / "build.json", {"schema": "cakd.build/1", **common, "models": models}
        )
        artifacts.write_json(
            folder / "parity.json", {"schema": "cakd.parity/1", **common, "rows": rows}
        )
    print(f"{args.out}: {summary(models, rows)} ({time.monotonic() - began:.0f} s)")
    if broken := failures(rows):
        raise GateFailed(f"{args.target}: {broken}")


def summary(models: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Format size, precision and verdict of each model, or the reason why it was skipped."""
    texts = []
    for model, entry in models.items():
        if entry["status"] == "skipped":
            texts.append(f"{model} skipped, {entry['reason']}")
            continue
        verdict = next(r["verdict"] for r in rows if r["artifact"] == entry["artefact"])
        note = f", {entry['reason']}" if entry["reason"] else ""
        texts.append(
            f"{model} {entry['size_mb']:.2f} MB {entry['precision_effective']} {verdict}{note}"
        )
    return "; ".join(texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.build", description=__doc__)
    parser.add_argument("export_dir", type=Path, help="artifacts/export")
    parser.add_argument("out", type=Path, help="artifacts/build/<target>")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--params", type=Path, default="params.yaml")
    cli.run(main, parser)
