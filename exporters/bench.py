"""Latency of any artefact in any runtime, without torch here: a row each, or a paired verdict between two."""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.measure import Subject, compare, measure
from exporters.session import TARGETS, Target
from exporters.worker import read_reference
from pipeline import cli, files
from pipeline.device import machine
from pipeline.errors import GateFailed, UserError, nearest

SCHEMA = "cakd.bench/1"
SUFFIXES = {"torch": ".safetensors", "ort": ".onnx", "ov": ".xml", "trt": ".plan"}
COLUMNS = (
    *("model", "target", "threads", "precision", "p50_ms", "p90_ms", "p99_ms", "min_ms"),
    *("cpu_p50_ms", "load_ms", "first_ms", "size_mb", "rss_mb"),
)


@dataclass(frozen=True)
class Bench:
    """`bench:` which targets are measured, and how long."""

    enabled: tuple[str, ...]  # of exporters.session.TARGETS, one report file each
    threads: tuple[int, ...] = (1,)  # a row each
    rounds: int = 20  # blocks a row, interleaved with those of the other rows
    seconds_per_row: float = 3.0  # in all blocks of a row, warm-up not counted
    seed: int = 0  # of the order within the rounds

    def __post_init__(self) -> None:
        for name in self.enabled:
            if name not in TARGETS:
                raise ValueError(f"enabled names {name!r}; {nearest(name, TARGETS)}")
        if not self.threads or min(self.threads) < 1:
            raise ValueError(
                f"threads is {list(self.threads)}; allowed: a list of counts from 1 on"
            )
        if self.rounds < 1 or self.seconds_per_row <= 0:
            raise ValueError(
                f"rounds is {self.rounds}, seconds_per_row {self.seconds_per_row}; both must be above 0"
            )


def subjects_of(
    models: Sequence[Path], names: Sequence[str] | None, threads: Sequence[int]
) -> list[Subject]:
    """Every model in every target that reads its kind of file, at every thread count.

    Raises UserError: no such file, unknown target, a model that none of the targets reads.
    """
    found = []
    for model in models:
        if not model.is_file():
            raise UserError(f"{model}: no such file; give .onnx, .xml, .safetensors or .plan")
        targets = [t for t in map(_target, names or [_default(model)]) if reads(t, model)]
        if not targets:
            raise UserError(
                f"{model}: none of the targets {', '.join(names or [])} reads it; {_readers(model)}"
            )
        found += [Subject(model.name, model, t, n) for t, n in itertools.product(targets, threads)]
    return found


def reads(target: Target, artefact: Path) -> bool:
    """Whether the target's runtime takes this kind of file."""
    return artefact.suffix == SUFFIXES[target.runtime]


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
    readers = [name for name, target in TARGETS.items() if reads(target, artefact)]
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
        cells.append([r["model"], r["target"], str(r["threads"]), precision, *shown, note])
    widths = [max(map(len, column)) for column in zip(*cells)]
    return "\n".join(
        "  ".join(
            c.ljust(w) if i < 4 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths[:-1]))
        )
        + f"  {line[-1]}".rstrip()
        for line in cells
    )


def against(args: argparse.Namespace, subjects: Sequence[Subject]) -> dict[str, Any]:
    """`--against` and `--self-test`: the one subject beside its baseline, or beside itself.

    Raises UserError: more than one subject, work that is not on the CPU, a baseline its target does not read.
    """
    if len(subjects) != 1:
        raise UserError(
            f"a comparison takes one model, target and thread count, got {len(subjects)}; "
            "give one MODEL, one of --targets and one of --threads"
        )
    candidate = subjects[0]
    if candidate.target.runtime == "trt":
        raise UserError(
            f"{candidate.target.name} runs on a GPU: the verdict is on CPU time; compare the rows instead"
        )
    if args.self_test:
        return compare(candidate, candidate, args.seed, args.reference)
    names = [args.against_target or candidate.target.name]
    if not args.against_target and not reads(candidate.target, args.against):
        names = [_default(args.against)]
    (baseline,) = subjects_of([args.against], names, args.threads)
    return compare(candidate, baseline, args.seed, args.reference)


def verdict_line(result: dict[str, Any]) -> str:
    """The comparison in words."""
    ratio, spread = result["ratio"], result["process_spread"]
    return (
        f"{result['verdict']}: CPU p50 {ratio['median']:.3f} times the baseline's, 95 % interval "
        f"{ratio['ci_low']:.3f} to {ratio['ci_high']:.3f}, tolerated 1 + {ratio['tol']:g}; "
        f"{result['processes']} processes a side (apart by {spread['candidate']:.1%} and "
        f"{spread['baseline']:.1%}), {result['rounds']} rounds"
    )


def main(args: argparse.Namespace) -> None:
    """Measure or compare, print, write `--json`, then let a failed verdict end with exit 3."""
    subjects = subjects_of(args.models, args.targets, args.threads)
    if args.reference:
        read_reference(args.reference)
    if args.against or args.self_test:
        content = against(args, subjects)
    else:
        seconds = args.seconds / args.rounds
        content = {"rows": measure(subjects, args.rounds, seconds, args.seed, args.reference)}
    print(table(content["rows"]))
    if "verdict" in content:
        print(verdict_line(content))
    if args.json:
        names = dict.fromkeys(s.target.name for s in subjects)
        inputs = {path.name: path for path in (*args.models, *filter(None, [args.against]))}
        params = {"rounds": args.rounds, "seconds": args.seconds, "seed": args.seed}
        files.write_json(args.json, document(",".join(names), params, inputs, **content))
    if all(r["status"] == "skipped" for r in content["rows"]):
        raise UserError(f"nothing could be measured: {content['rows'][0]['reason']}")
    if content.get("verdict") == "FAIL":
        what = "this machine tells a file from itself" if args.self_test else "slower"
        raise GateFailed(f"{args.models[0]}: {what}: {verdict_line(content)}")


def _count(text: str) -> int:
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 1 or more")
    return value


def _counts(text: str) -> list[int]:
    return [_count(part) for part in text.split(",")]


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
    add("--threads", type=_counts, default=[1], metavar="N[,N]", help="default 1")
    add("--rounds", type=_count, default=Bench.rounds, help="blocks a row")
    add(
        "--seconds",
        type=_seconds,
        default=Bench.seconds_per_row,
        help="timed, a row; a block, SECONDS/ROUNDS, should stay near 0.15",
    )
    add("--seed", type=int, default=0, help="of the order of the blocks")
    add("--reference", type=Path, metavar="NPZ", help="run its pictures x instead of smooth ones")
    add("--json", type=Path, metavar="F", help="write the rows, raw times included")
    mode = p.add_mutually_exclusive_group()
    mode.add_argument(
        "--against", type=Path, metavar="BASELINE", help="paired verdict; FAIL exits 3"
    )
    mode.add_argument(
        "--self-test", action="store_true", help="MODEL against itself: the noise here"
    )
    add("--against-target", metavar="NAME", help="run BASELINE there; default: where MODEL runs")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
