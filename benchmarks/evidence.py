"""Evidence that grows from day to day: `python -m benchmarks.evidence cifar100-few --data PATH --minutes 60`.

Trains every method of the recipe (`distill.methods`) seed by seed and keeps each finished run as a small JSON in
`benchmarks/results/runs/<recipe>` (benchmarks/ledger.py); a run that is there is not repeated. After `--minutes`
it stops at a checkpoint, from which the next call goes on. `--jobs N` trains N students at a time, which fills a
GPU that one small student leaves idle; a second call beside the first does the same. The table is made of the kept
runs and nothing else, the same bytes on every machine: `--table` writes it without training. A difference is taken
over the seeds that both methods have; the table says how many.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import signal
import statistics
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.ledger import FOLDER, Identity, Ledger, Run, identity, identity_of_teacher
from benchmarks.methods import AGAINST, cell, interval, teacher_row
from benchmarks.runs import RECIPES, Runs, merged
from pipeline.core import artifacts, cli
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError
from pipeline.distill.methods.table import terms_of
from pipeline.distill.settings import Distill
from pipeline.training.resume import locked

SCHEMA = "cakd.evidence-table/1"
TEACHER = "teacher"  # stands in the ledger as a method
BySeed = Mapping[int, Run]


class Stopped(BaseException):
    """The time is over and no training runs. Not an Exception, so that nothing turns it into a UserError."""


@contextmanager
def deadline(minutes: float | None) -> Iterator[Callable[[], bool]]:
    """Stop what runs inside after `minutes`: a training at its checkpoint, anything else at once.

    Yields whether the time is over, to be asked between two trainings: one in its last step does not leave.
    """
    over = threading.Event()
    if minutes is None:
        yield over.is_set
        return

    def stop(*_: object) -> None:
        raise Stopped

    def end() -> None:
        over.set()
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, stop)
    timer = threading.Timer(60 * minutes, end)
    timer.daemon = True
    timer.start()
    try:
        with suppress(Stopped):
            yield over.is_set
    except SystemExit as error:  # how a training leaves after its checkpoint
        if error.code != 128 + signal.SIGINT or timer.is_alive():
            raise
    finally:
        timer.cancel()
        signal.signal(signal.SIGINT, before)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process alone makes the run of the lock file `path`; a killed one gives it up."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as lock:
        yield locked(lock)


def train(args: argparse.Namespace, ledger: Ledger, over: Callable[[], bool]) -> None:
    """Make the missing runs that no other process makes, all methods of a seed before the next seed.

    Between two of them it asks whether the time is `over`.
    """
    params = merged(args.recipe, args.data, args.set)
    shared = Runs.of(args.recipe, params)
    settings = shared.section(Distill)
    teacher = artifacts.read_json(shared.teacher.with_suffix(".json"))["weights_sha256"]

    def make(method: str, seed: int, made_of: Identity, run: Callable[[], Run]) -> None:
        if over():
            raise Stopped
        if ledger.read(method, seed, made_of) is not None:
            return
        with claimed(shared.folder / "claims" / f"{method}-{seed}.lock") as free:
            if not free or ledger.read(method, seed, made_of) is not None:
                return
            figures = run()
            if args.untimed or args.jobs > 1:
                figures = {key: value for key, value in figures.items() if key != "step_ms"}
            ledger.write(method, seed, made_of, figures)

    with assisted(args):
        for seed in range(args.seeds):
            for method in args.methods or settings.methods:
                own = identity(params, settings.of_method(method), method, seed, teacher)
                make(method, seed, own, partial(shared.run, settings, method, seed))
        of_teacher = identity_of_teacher(params, teacher)
        make(TEACHER, 0, of_teacher, partial(shared.on_test, shared.teacher))


@contextmanager
def assisted(args: argparse.Namespace) -> Iterator[None]:
    """Run `args.jobs - 1` further processes of the same queue beside the body, and wait for them after it.

    Where the body ends early, they are stopped: a training saves its checkpoint.
    Raises UserError: one of them failed.
    """
    spawn = multiprocessing.get_context("spawn")
    alone = argparse.Namespace(**vars(args) | {"jobs": 1, "untimed": True})
    others = [spawn.Process(target=assist, args=(alone,)) for _ in range(args.jobs - 1)]
    for other in others:
        other.start()
    try:
        yield
    except BaseException:
        for other in others:
            other.terminate()
        raise
    finally:
        for other in others:
            while other.is_alive():
                with suppress(Stopped):  # the time may be over while waiting; theirs is too
                    other.join()
    failed = [o.exitcode for o in others if o.exitcode not in (0, 128 + signal.SIGINT)]
    if failed:
        raise UserError(
            f"--jobs: got exit code {failed[0]} of a process of the queue; expected 0; see its error above, then "
            "run again to go on"
        )


def assist(args: argparse.Namespace) -> None:
    """Be a further process of the queue."""
    cli.die_with_parent()
    try:
        with deadline(args.minutes) as over:
            train(args, Ledger(FOLDER / args.recipe), over)
    except UserError as error:
        sys.exit(f"benchmarks.evidence: error: {error}")


def differences(runs: Mapping[str, BySeed], method: str, other: str, what: str) -> list[float]:
    """Percentage points over the seeds that both have."""
    both = sorted({*runs[method]} & {*runs.get(other, {})})
    return [100 * (runs[method][seed][what] - runs[other][seed][what]) for seed in both]


def compared(runs: Mapping[str, BySeed]) -> dict[str, dict[str, Any]]:
    """Of every method: seeds, means, paired differences with half widths, the time of a step over plain's."""
    table: dict[str, dict[str, Any]] = {}
    for method, by_seed in runs.items():
        row: dict[str, Any] = {"seeds": sorted(by_seed)}
        for what in ("clean", "noisy"):
            row[what] = 100 * statistics.fmean(run[what] for run in by_seed.values())
            for other in AGAINST:
                if other != method and (points := differences(runs, method, other, what)):
                    mean, half = interval(points)
                    row[f"{what}_minus_{other}"] = {"mean": mean, "half_width_95": half}
        own, plain = (
            [r["step_ms"] for r in rows.values() if "step_ms" in r]
            for rows in (by_seed, runs.get("plain", {}))
        )
        if own and plain:
            row["step_over_plain"] = statistics.median(own) / statistics.median(plain)
        table[method] = row
    return table


def result(entries: Mapping[str, Mapping[int, Mapping[str, Any]]], recipe: str) -> dict[str, Any]:
    """The JSON of the table: of the kept runs alone."""
    every = [entry for by_seed in entries.values() for entry in by_seed.values()]
    figures = {m: {s: e["figures"] for s, e in by_seed.items()} for m, by_seed in entries.items()}
    teacher = figures.pop(TEACHER, {}).get(0)
    order = sorted(figures, key=lambda method: (len(terms_of(method)), method))
    return {
        "schema": SCHEMA,
        "recipe": recipe,
        "machines": sorted({entry["machine"] for entry in every}),
        "commits": sorted({entry["commit"] for entry in every}),
        "teachers": sorted({entry["teacher"] for entry in every if entry["teacher"]}),
        "teacher": teacher,
        "methods": compared({method: figures[method] for method in order}),
        "runs": {method: {str(s): run for s, run in figures[method].items()} for method in order},
    }


def markdown(summary: Mapping[str, Any]) -> str:
    """The table of a result."""
    heads = [f"minus {name}" for name in AGAINST]
    lines = [
        f"{'; '.join(summary['machines'])}. Command: `python -m benchmarks.evidence {summary['recipe']} --table`",
        "",
        f"| method | seeds | clean top-1 (%) | {' | '.join(heads)} | noisy top-1 (%) | minus plain | "
        "minus logits | step / plain |",
        "|---|--:|--:|" + "--:|" * (len(heads) + 4),
    ]
    if (teacher := summary["teacher"]) is not None:
        clean, noisy = (f"{100 * teacher[what]:.1f}" for what in ("clean", "noisy"))
        lines.append(teacher_row(["teacher", "", clean], len(heads), noisy))
    for method, row in summary["methods"].items():
        clean = " | ".join(cell(row, f"clean_minus_{name}") for name in AGAINST)
        cost = f"{row['step_over_plain']:.1f}" if "step_over_plain" in row else ""
        lines.append(
            f"| {method} | {len(row['seeds'])} | {row['clean']:.1f} | {clean} | {row['noisy']:.1f} | "
            f"{cell(row, 'noisy_minus_plain')} | {cell(row, 'noisy_minus_logits')} | {cost} |"
        )
    lines += [
        "",
        "± half a 95 % interval over the seeds that both methods have, points; none beside a single seed. `plain` "
        "sees labelled images only; `control` is plain on the batches of the distilled methods. Steps are "
        "compared over all machines.",
    ]
    return "\n".join(lines) + "\n"


def main(args: argparse.Namespace) -> None:
    """Train what is missing, then print and write the table. Raises UserError: as `Ledger.read`; no runs."""
    ledger = Ledger(FOLDER / args.recipe)
    if not args.table:
        with deadline(args.minutes) as over:
            train(args, ledger, over)
    entries = ledger.entries()
    if not {*entries} - {TEACHER}:
        raise UserError(
            f"{ledger.folder}: got no runs; expected one or more; run it without --table, or longer"
        )
    summary = result(entries, args.recipe)
    print(markdown(summary))
    out = args.out or FOLDER.parent / f"evidence-{args.recipe}"
    artifacts.write_json(out.with_suffix(".json"), artifacts.rounded(summary))
    with atomic(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(summary), encoding="utf-8")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(prog="benchmarks.evidence", description=__doc__)
    line.add_argument("recipe", help=f"a name of {RECIPES}/")
    line.add_argument("--data", metavar="PATH", help="where its images are (prepare.path)")
    line.add_argument("--methods", nargs="+", help="default: distill.methods of the recipe")
    line.add_argument("--seeds", type=int, default=3, help="of the student")
    line.add_argument("--minutes", type=float, help="stop after them, in good order")
    line.add_argument("--jobs", type=cli.count, default=1, help="students trained at a time")
    line.add_argument(
        "--untimed",
        action="store_true",
        help="keep no step times, as beside other work; --jobs implies it",
    )
    line.add_argument("--table", action="store_true", help="train nothing")
    line.add_argument("-S", "--set", action="append", default=[], metavar="KEY=VALUE")
    line.add_argument("--out", type=Path, help="where to write the table, without suffix")
    return line


if __name__ == "__main__":
    cli.run(main, parser())
