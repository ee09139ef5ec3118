"""Stage students: latency of every student of the run, untrained, where there are several.

An untrained network costs what a trained one does, so this needs no training and can run beside it.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from exporters.artifact.session import TARGETS
from exporters.bench.subjects import Bench
from exporters.candidates import rounds, untrained
from exporters.candidates.catalogue import Candidate
from pipeline.core import artifacts, cli, config, progress
from pipeline.core.machine import machine
from pipeline.core.students import MAIN, Students
from pipeline.core.validation import schema_name
from pipeline.data.prepared import Prepared

GRID = 1  # the tap is checked by stages.check, with the teacher's own grid
OF_TARGET = ("wall_ms_max", "size_mb_max")


def main(args: argparse.Namespace) -> None:
    """Write `args.out`: every student on the targets that decide."""
    students = config.value("distill.students", args.params, default={})
    bench = config.load(Bench, args.params)
    budgets = config.value("report.budgets", args.params, default={})
    main_student = {
        "student": config.value("distill.student", args.params),
        "student_kwargs": config.value("distill.student_kwargs", args.params, default={}),
    }
    targets = deciding(budgets, bench.enabled) if students else []
    listed = [candidate(n, s) for n, s in {MAIN: main_student, **students}.items()]
    prepared = Prepared.open(args.prepared)
    built = []
    with progress.Progress("networks", len(listed) * len(targets)) as bar:
        for target in targets:
            sizes = (prepared.image_size, len(prepared.classes), GRID)
            settings = untrained.Settings(target, *sizes)
            for one in listed:
                built.append((untrained.build(one, settings, args.work), TARGETS[target]))
                bar(len(built))
    protocol = rounds.Protocol(bench.rounds, bench.seconds_per_row / bench.rounds)
    rows = rounds.measured_rows(built, min(bench.threads), protocol, args.work)
    by_target = {
        target: rows[i * len(listed) : (i + 1) * len(listed)] for i, target in enumerate(targets)
    }
    document: dict[str, Any] = {"schema": schema_name(Students), "targets": by_target}
    if students:
        document["machine"] = machine()
        document["provenance"] = artifacts.provenance({"students": students, **vars(protocol)})
    artifacts.write_json(args.out, document)
    print(f"{args.out}: {summary(by_target)}")


def candidate(name: str, student: dict[str, Any]) -> Candidate:
    """A student of params.yaml as a candidate of that name."""
    return Candidate(name, student["student"], student.get("student_kwargs", {}))


def deciding(budgets: Iterable[str], enabled: Iterable[str]) -> list[str]:
    """The targets that budgets of latency or size name.

    Where one of these names none, which the best target keeps, or there are none, every enabled one that needs no
    torch as well.
    """
    named = [b.rpartition(".")[0] for b in budgets if b.rpartition(".")[2] in OF_TARGET]
    others = [t for t in enabled if not TARGETS[t].runtime.startswith("torch")]
    every = others if "" in named or not named else []
    return list(dict.fromkeys([*filter(None, named), *every]))


def summary(by_target: dict[str, list[dict[str, Any]]]) -> str:
    """The p50 of every student by target, in a line."""
    if not by_target:
        return "one student, nothing to compare"
    texts = []
    for target, rows in by_target.items():
        known = [f"{r['name']} {r['wall_ms']['p50'] or 'not measured'}" for r in rows]
        texts.append(f"{target} p50 (ms) {', '.join(known)}")
    return "; ".join(texts)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.students", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("out", type=Path, help="reports/students.json")
    parser.add_argument(
        "--work", type=Path, default=Path(".work/candidates"), help="networks and unfinished rounds"
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
