"""Stage distill: train one student by one method, from prepared images, the teacher and its features.

On several GPUs or machines: CAKD_LAUNCH="torchrun --nproc-per-node N" (docs/scaling.md).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import artifacts, cli, config, machine
from pipeline.core.students import MAIN
from pipeline.data import prepared
from pipeline.distill import curves, distill
from pipeline.distill.settings import PERF_SCHEMA, Distill
from pipeline.store.policy import Cache
from pipeline.store.reading import open_manifest
from pipeline.training import ranks as training_ranks


def main(args: argparse.Namespace) -> None:
    """Train the student of params.yaml's `distill:` by `--method`."""
    settings = config.load(Distill, args.params).of_student(args.student)
    with training_ranks.ranks(settings.compute.backend()) as ranks:
        figures = distill.distill(
            settings,
            args.method,
            prepared.Prepared.open(args.prepared),
            args.teacher,
            args.features,
            args.out,
            args.work,
            config.load(Cache, args.params),
            ranks,
        )
    if ranks.rank:
        return
    lines = figures.pop("curves")
    artifacts.write_json(
        args.perf,
        {
            "schema": PERF_SCHEMA,
            **artifacts.rounded(figures, 4),
            "losses": artifacts.rounded(curves.final(lines)),
            "method": args.method,
            **({} if args.student == MAIN else {"student": args.student}),
            "teacher_r12": open_manifest(args.features).get("r12"),
            "machine": machine.machine(),
            "provenance": artifacts.provenance(student=args.out / "student.safetensors"),
        },
    )
    if args.curves is not None:
        curves.write_csv(lines, args.curves)
    rate = figures["img_per_s"]["median"]
    print(f"{args.out}: {args.method}, {figures['steps']} steps, {rate:.0f} img/s, "
          f"{figures['labels_seen']} labels seen")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.distill", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("teacher", type=Path, help="teacher.safetensors")
    parser.add_argument("features", type=Path, help="the feature cache")
    parser.add_argument("out", type=Path, help="the student's folder to write")
    parser.add_argument("perf", type=Path, help="train/<method>.json to write")
    parser.add_argument("--method", required=True)
    parser.add_argument("--student", default=MAIN, help="a name of distill.students")
    parser.add_argument("--curves", type=Path, help="CSV of the losses to write")
    parser.add_argument("--work", type=Path, default=Path(".work/distill"), help="unfinished work")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser, launch="stages.distill")
