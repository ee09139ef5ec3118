"""distill: one student by one method, from prepared images, the teacher and its features."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline import cli, config, data, device, files, training
from pipeline.store.policy import Cache


def main(args: argparse.Namespace) -> None:
    """Train the student of params.yaml's `distill:` by `--method`."""
    figures = training.distill(
        config.load(training.Distill, args.params),
        args.method,
        data.Prepared.open(args.prepared),
        args.teacher,
        args.features,
        args.out,
        args.work,
        config.load(Cache, args.params),
    )
    files.write_json(
        args.perf,
        {
            "schema": training.PERF_SCHEMA,
            "method": args.method,
            **figures,
            "machine": device.machine(),
            "provenance": files.provenance(student=args.out / "student.safetensors"),
        },
    )
    rate = figures["img_per_s"]["median"]
    print(f"{args.out}: {args.method}, {figures['steps']} steps, {rate:.0f} img/s, "
          f"{figures['labels_seen']} labels seen")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.distill", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("teacher", type=Path, help="teacher.safetensors")
    parser.add_argument("features", type=Path, help="the feature store")
    parser.add_argument("out", type=Path, help="the student's folder to write")
    parser.add_argument("perf", type=Path, help="train/<method>.json to write")
    parser.add_argument("--method", required=True)
    parser.add_argument("--work", type=Path, default=Path(".work/distill"), help="unfinished work")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
