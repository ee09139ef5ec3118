"""Latency of any artefact in any runtime, without torch here: a row each, or a paired verdict a target."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters import gates, versus
from exporters.measure import Measured, Subject, measure, save_samples
from exporters.session import TARGETS, Target
from exporters.worker import read_reference
from pipeline import cli, files, latency
from pipeline.device import machine, usable_cores
from pipeline.errors import GateFailed, UserError, nearest

SCHEMA = "cakd.bench/2"
COLUMNS = (
    *("model", "target", "threads", "batch", "precision", "p50_ms", "p90_ms", "p99_ms", "min_ms"),
    *("cpu_p50_ms", "load_ms", "first_ms", "size_mb", "rss_mb"),
)


@dataclass(frozen=True)
class Bench:
    """`bench:` which targets are measured, and how long."""

    enabled: tuple[str, ...]  # of exporters.session.TARGETS, one report file each
    threads: tuple[int, ...] = (1,)  # a row each
    batches: tuple[int, ...] = (1,)  # images a call, a row each
    rounds: int = 20  # blocks a row, interleaved with those of the other rows
    seconds_per_row: float = 3.0  # in all blocks of a row, warm-up not counted
    seed: int = 0  # of the order within the rounds

    def __post_init__(self) -> None:
        for name in self.enabled:
            if name not in TARGETS:
                raise ValueError(f"enabled names {name!r}; {nearest(name, TARGETS)}")
        for name, counts in (("threads", self.threads), ("batches", self.batches)):
            if not counts or min(counts) < 1:
                raise ValueError(f"{name} is {list(counts)}; allowed: a list of counts from 1 on")
        if self.rounds < 1 or self.seconds_per_row <= 0:
            raise ValueError(
                f"rounds is {self.rounds}, seconds_per_row {self.seconds_per_row}; both must be above 0"
            )


def subjects_of(
    models: Sequence[Path],
    names: Sequence[str] | None,
    threads: Sequence[int],
    batches: Sequence[int | None] = (None,),
) -> list[Subject]:
    """Every model in every target that reads its kind of file, at every thread count and batch.

    Raises UserError: no such file, unknown target, a model that none of the targets reads.
    """
    found = []
    for model in models:
        if not model.is_file():
            raise UserError(f"{model}: no such file; give .onnx, .xml, .safetensors or .plan")
        targets = [t for t in map(_target, names or [_default(model)]) if t.reads(model)]
        if not targets:
            raise UserError(
                f"{model}: none of the targets {', '.join(names or [])} reads it; {_readers(model)}"
            )
        found += [
            Subject(model.name, model, target, count, batch=batch)
            for target, count, batch in itertools.product(targets, threads, batches)
        ]
    return found


def _target(name: str) -> Target:
    if name not in TARGETS:
        raise UserError(f"targets: unknown target {name!r}; {nearest(name, TARGETS)}")
    return TARGETS[name]


def _default(artefact: Path) -> str:
    """The target of a file that came without one. Raises UserError: a kind of file that does not tell."""
    precision = "int8" if artefact.stem.endswith("-int8") else "fp32"
    names = {".onnx": f"ort-{precision}", ".xml": f"ov-{precision}", ".safetensors": "torch-eager"}
    if artefact.suffix not in names:
        raise UserError(f"{artefact}: its kind does not name one target; {_readers(artefact)}")
    return names[artefact.suffix]


def _readers(artefact: Path) -> str:
    readers = [name for name, target in TARGETS.items() if target.reads(artefact)]
    return (
        f"give --targets from: {', '.join(readers)}" if readers else "no target reads such a file"
    )


def document(target: str, params: Any, inputs: dict[str, Path], **content: Any) -> dict[str, Any]:
    """A bench JSON: `content` (rows, and the verdict of a comparison) with its machine and provenance."""
    return {
        "schema": SCHEMA,
        "target": target,
        **content,
        "machine": machine(),
        "provenance": files.provenance(params, **inputs),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows as aligned plain text; a skipped row ends with its reason, a noisy one with its flags."""
    cells = [[*COLUMNS, ""]]
    for r in rows:
        wall = r["wall_ms"]
        figures = [*(wall[k] for k in ("p50", "p90", "p99", "min")), r["cpu_ms"]["p50"]]
        figures += [r[k] for k in ("load_ms", "first_ms", "size_mb", "rss_mb")]
        note = f"skipped: {r['reason']}" if r["reason"] else ", ".join(r["flags"])
        precision = r["precision_effective"] or r["precision_requested"]
        shown = ["n/a" if f is None else f"{f:.4g}" for f in figures]
        counts = [str(r["threads"]), str(r["batch"])]
        cells.append([r["model"], r["target"], *counts, precision, *shown, note])
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 5 else c.rjust(w)
            for i, (c, w) in enumerate(zip(line[:-1], widths[:-1], strict=True))
        )
        + f"  {line[-1]}".rstrip()
        for line in cells
    )


def pairs(args: argparse.Namespace, subjects: Sequence[Subject]) -> list[tuple[Subject, Subject]]:
    """`--against` and `--self-test`: every subject beside its baseline, or beside itself.

    Raises UserError: work that is not on the CPU, a baseline that is missing or that its target does not read.
    """
    for subject in subjects:
        if subject.target.runtime == "trt":
            raise UserError(
                f"{subject.target.name} runs on a GPU: the verdict is on CPU time; compare the rows instead"
            )
    return [(s, s if args.self_test else _baseline(s, args)) for s in subjects]


def _baseline(candidate: Subject, args: argparse.Namespace) -> Subject:
    """The file of `--against`, or that of the candidate's name in its folder, where the candidate runs."""
    path = args.against / candidate.artefact.name if args.against.is_dir() else args.against
    names = [args.against_target or candidate.target.name]
    if not args.against_target and path.is_file() and not candidate.target.reads(path):
        names = [_default(path)]
    (found,) = subjects_of([path], names, [candidate.threads], [candidate.batch])
    return found


def compared(args: argparse.Namespace, subjects: Sequence[Subject]) -> tuple[Any, list[Measured]]:
    """Every pair, one after the other: the verdicts, and what was measured in the order of the rows."""
    comparisons, found = [], []
    for candidate, baseline in pairs(args, subjects):
        told, both = versus.compare(candidate, baseline, args.seed, args.reference, args.allow)
        comparisons.append(told)
        found += both
    verdict = latency.worst(told["verdict"] for told in comparisons)
    return {"verdict": verdict, "comparisons": comparisons}, found


def verdict_line(told: dict[str, Any]) -> str:
    """A comparison in words."""
    broken = [_gate(g) for g in told["gates"] if g["verdict"] in ("FAIL", "ALLOWED")]
    parts = [told["reason"]] if told["reason"] else [*broken, _time(told)]
    where = f"{told['model']} on {told['target']}, {told['threads']} threads"
    return f"{told['verdict']}: {'; '.join(parts)} [{where}]"


def _gate(row: dict[str, Any]) -> str:
    what = f"{row['name']}: {row['candidate']}, baseline {row['baseline']}, limit {row['limit']}"
    return f"{what} (allowed)" if row["verdict"] == "ALLOWED" else what


def _time(told: dict[str, Any]) -> str:
    ratio, spread = told["ratio"], told["process_spread"]
    return (
        f"CPU p50 {ratio['median']:.3f} times the baseline's, 95 % interval "
        f"{ratio['ci_low']:.3f} to {ratio['ci_high']:.3f}, tolerated 1 + {ratio['tol']:g}; "
        f"{told['processes']} processes a side (apart by {spread['candidate']:.1%} and "
        f"{spread['baseline']:.1%}), {told['rounds']} rounds"
    )


def noise_floor(comparisons: Sequence[dict[str, Any]]) -> str:
    """What a self-test says of this machine, now: the smallest change that it can tell from none."""
    ratios = [told["ratio"] for told in comparisons if told["ratio"]]
    floor = max(max(ratio["ci_high"] - 1, 1 - ratio["ci_low"]) for ratio in ratios)
    return (
        f"noise floor here and now: a change of CPU time below {floor:.1%} cannot be told from none"
    )


def main(args: argparse.Namespace) -> None:
    """Measure or compare, print, write `--json` and `--samples`, then let a failed verdict end with exit 3."""
    subjects = subjects_of(args.models, args.targets, args.threads, args.batch)
    if args.reference:
        read_reference(args.reference)
    verdicts: dict[str, Any] = {}
    if args.against or args.self_test:
        verdicts, found = compared(args, subjects)
    else:
        seconds = args.seconds / args.rounds
        found = measure(subjects, args.rounds, seconds, args.seed, args.reference)
    rows = [one.row for one in found]
    print("\n".join([table(rows), *map(verdict_line, verdicts.get("comparisons", []))]))
    write(args, subjects, found, {**verdicts, "rows": rows})
    conclude(args, found, verdicts)


def write(
    args: argparse.Namespace,
    subjects: Sequence[Subject],
    found: Sequence[Measured],
    content: dict[str, Any],
) -> None:
    """The files asked for by `--json` and `--samples`."""
    if args.samples:
        save_samples(args.samples, found)
    if args.json:
        names = dict.fromkeys(s.target.name for s in subjects)
        inputs = {path.name: path for path in args.models}
        if args.against and args.against.is_file():
            inputs[args.against.name] = args.against
        params = {"rounds": args.rounds, "seconds": args.seconds, "seed": args.seed}
        files.write_json(args.json, document(",".join(names), params, inputs, **content))


def conclude(args: argparse.Namespace, found: Sequence[Measured], verdicts: dict[str, Any]) -> None:
    """The end of the command by what was found.

    Raises UserError: nothing could be measured or compared; GateFailed: a verdict is FAIL.
    """
    comparisons = verdicts.get("comparisons", [])
    failed = [verdict_line(told) for told in comparisons if told["verdict"] == "FAIL"]
    if failed:
        what = "this machine tells a file from itself" if args.self_test else "not as good"
        raise GateFailed(f"{args.models[0]}: {what}: {'; '.join(failed)}")
    if not any(one.measured for one in found):
        raise UserError(f"nothing could be measured: {found[0].row['reason']}")
    if comparisons and not any(told["ratio"] for told in comparisons):
        raise UserError(f"not comparable: {comparisons[0]['reason']}")
    if args.self_test:
        print(noise_floor(comparisons))


def _counts(text: str) -> list[int]:
    return [cli.count(part) for part in text.split(",")]


def _threads(text: str) -> list[int]:
    """As `_counts`; `all` is every core this process may use, once if that is a count already given."""
    counts = [usable_cores() if part == "all" else cli.count(part) for part in text.split(",")]
    return list(dict.fromkeys(counts))


def _seconds(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; allowed: above 0")
    return value


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.bench`."""
    p = argparse.ArgumentParser(prog="python -m exporters.bench", description=__doc__)
    add = p.add_argument
    add("models", nargs="+", type=Path, metavar="MODEL", help=".onnx, .xml, .safetensors, .plan")
    add(
        "--targets",
        type=lambda s: s.split(","),
        help=f"of {', '.join(TARGETS)}; default: by suffix",
    )
    add("--threads", type=_threads, default=[1], metavar="N[,all]", help="default 1")
    add("--batch", type=_counts, default=[None], metavar="N[,N]", help="images a call, default 1")
    add("--rounds", type=cli.count, default=Bench.rounds, help="blocks a row")
    add(
        "--seconds",
        type=_seconds,
        default=Bench.seconds_per_row,
        help="timed, a row; a block, SECONDS/ROUNDS, should stay near 0.15",
    )
    add("--seed", type=int, default=0, help="of the order of the blocks")
    add("--reference", type=Path, metavar="NPZ", help="run its pictures x instead of smooth ones")
    add("--json", type=Path, metavar="F", help="write the rows, and the verdicts")
    add("--samples", type=Path, metavar="NPZ", help="write every call's times, and the blocks")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument(
        "--against",
        type=Path,
        metavar="BASELINE",
        help="a file, or a folder with one of each MODEL's name: paired verdicts; FAIL exits 3",
    )
    mode.add_argument(
        "--self-test", action="store_true", help="MODEL against itself: the noise here"
    )
    add("--against-target", metavar="NAME", help="run BASELINE there; default: where MODEL runs")
    add("--allow", nargs="+", default=(), choices=gates.GATES, help="hard gates that may change")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
