"""Stage select: evaluate every student on val and write which one is exported."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import artifacts, cli, config
from pipeline.core.machine import machine
from pipeline.core.students import BEST, MAIN, Students, folder_of
from pipeline.data.prepared import Prepared
from pipeline.evaluate import selection


def main(args: argparse.Namespace) -> None:
    """Select a student of `distill.methods` by `export.method`; of several students one by `export.student`."""
    methods = config.value("distill.methods", args.params)
    requested = config.value("export.method", args.params)
    crop_pct = config.value("evaluate.crop_pct", args.params, default=1.0)
    prepared = Prepared.open(args.prepared)
    names = (MAIN, *config.value("distill.students", args.params, default={}))
    students = {
        name: {m: folder_of(args.students, name) / m / "student.safetensors" for m in methods}
        for name in names
    }
    if len(names) == 1:
        result = selection.select(prepared, students[MAIN], requested, crop_pct)
    else:
        student = config.value("export.student", args.params, default=BEST)
        budgets = config.value("report.budgets", args.params, default={})
        latency = artifacts.read(args.latency, Students, "run the stage students again")
        result = selection.select_student(
            prepared, students, latency, budgets, (student, requested), crop_pct
        )
    document = {"schema": selection.SCHEMA, **artifacts.rounded(result), "machine": machine()}
    artifacts.write_json(args.out, document)
    print(f"{args.out}: {result['selected']}, {result['reason']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.select", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("students", type=Path, help="the folder of the students, one per method")
    parser.add_argument("out", type=Path, help="selection.json to write")
    parser.add_argument(
        "--latency",
        type=Path,
        default=Path("reports/students.json"),
        help="latencies of the students, where there are several",
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
