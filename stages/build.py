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
    """Write `args.out`: artefacts, build.json, parity.json. Raises GateFailed, after writing, on fp32 parity."""
    began = time.monotonic()
    params = config.load(Build, args.params)
    exported = Exported.open(args.export_dir)
    models: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    made_of = {Path(name).stem: args.export_dir / name for name in INPUTS}
    common = {
        "target": args.target,
        "machine": machine(),
        "provenance": artifacts.provenance(params.__dict__, **made_of),
    }
    with atomic_dir(args.out) as folder:
        for model in MODELS:
            models[model], found = build_model(
                TARGETS[args.target], model, exported, folder, params
            )
            rows += found
        artifacts.write_json(
            folder / "build.json", {"schema": "cakd.build/1", **common, "models": models}
        )
        artifacts.write_json(
            folder / "parity.json", {"schema": "cakd.parity/1", **common, "rows": rows}
        )
    print(f"{args.out}: {told(models, rows)} ({time.monotonic() - began:.0f} s)")
    if broken := failures(rows):
        raise GateFailed(f"{args.target}: {broken}")


def told(models: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Per model: size, precision and verdict, or why there is none."""
    parts = []
    for model, entry in models.items():
        if entry["status"] == "skipped":
            parts.append(f"{model} skipped, {entry['reason']}")
            continue
        verdict = next(r["verdict"] for r in rows if r["artifact"] == entry["artefact"])
        note = f", {entry['reason']}" if entry["reason"] else ""
        parts.append(
            f"{model} {entry['size_mb']:.2f} MB {entry['precision_effective']} {verdict}{note}"
        )
    return "; ".join(parts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.build", description=__doc__)
    parser.add_argument("export_dir", type=Path, help="artifacts/export")
    parser.add_argument("out", type=Path, help="artifacts/build/<target>")
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--params", type=Path, default="params.yaml")
    cli.run(main, parser)
