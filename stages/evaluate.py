"""Stage evaluate: accuracy of teacher and students, clean and under noise, its evidence, and training speed."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from pipeline.core import artifacts, cli, config
from pipeline.core import machine as core_machine
from pipeline.core.formats import Selection, Train
from pipeline.core.students import MAIN, folder_of
from pipeline.data.prepared import Prepared
from pipeline.distill.settings import Distill
from pipeline.evaluate import accuracy, evidence
from pipeline.evaluate.evaluate import evaluate

TRAIN_PERF_SCHEMA = "cakd.train_perf/1"
OF_A_TRAINING = (
    "schema",
    "losses",
    "machine",
    "provenance",
)  # keys that train_perf.json leaves there


def main(args: argparse.Namespace) -> None:
    """Evaluate the students of `distill.methods`; of several the selected one, and the others in brief."""
    settings = config.load(accuracy.Evaluate, args.params)
    methods = config.load(Distill, args.params).methods
    further = config.load(Distill, args.params).students
    chosen, others = MAIN, {}
    if further:
        selection = artifacts.read(args.selection, Selection, "run select again")
        chosen = selection.get("student", MAIN)
        others = {n: paths(args.students, n, methods) for n in (MAIN, *further)}
        del others[chosen]
    students = paths(args.students, chosen, methods)
    prepared = Prepared.open(args.prepared)
    machine = core_machine.machine()
    result, evidence_result = evaluate(settings, prepared, args.teacher, students, others)
    document = {"schema": accuracy.SCHEMA, **artifacts.rounded(result), "machine": machine}
    artifacts.write_json(args.accuracy, document)
    artifacts.write_json(
        args.evidence, {"schema": evidence.SCHEMA, **evidence_result, "machine": machine}
    )
    train = folder_of(args.train, chosen)
    perf = {m: artifacts.read(train / f"{m}.json", Train) for m in methods}
    artifacts.write_json(
        args.perf,
        {
            "schema": TRAIN_PERF_SCHEMA,
            "methods": {
                m: {k: v for k, v in t.items() if k not in OF_A_TRAINING} for m, t in perf.items()
            },
            "machine": machine,
            "provenance": {m: t["provenance"] for m, t in perf.items()},
        },
    )
    top1 = ", ".join(f"{m} {f['clean']['top1']:.4f}" for m, f in result["models"].items())
    print(f"{args.accuracy}: {settings.split} top-1: {top1}")


def paths(folder: Path, student: str, methods: Sequence[str]) -> list[Path]:
    """The checkpoints of a student, one a method."""
    return [folder_of(folder, student) / method / "student.safetensors" for method in methods]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.evaluate", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("teacher", type=Path, help="teacher.safetensors")
    parser.add_argument("students", type=Path, help="the folder of the students, one per method")
    parser.add_argument("train", type=Path, help="the folder of train/<method>.json")
    parser.add_argument("accuracy", type=Path, help="accuracy.json to write")
    parser.add_argument("evidence", type=Path, help="evidence.json to write")
    parser.add_argument("perf", type=Path, help="train_perf.json to write")
    parser.add_argument(
        "--selection",
        type=Path,
        default=Path("reports/selection.json"),
        help="which student is exported, where there are several",
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
