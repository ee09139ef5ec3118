"""Which CNN fits a latency budget, before any training: untrained networks are exported and measured.

`python -m exporters.candidates --target ort-int8 --budget-ms 5 --image-size 128 [--students NAME|FAMILY ...]`
`--pack DIR` writes them for a device instead, `--from device.json` reads what was measured there (docs/choose.md).
A killed call goes on: networks that are built and rounds that are measured are kept in `--work`.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.artifact.session import TARGETS
from exporters.bench.subjects import Bench
from exporters.candidates import pack, ranking, rounds, table
from exporters.candidates.catalogue import FAMILIES, candidates
from exporters.candidates.untrained import Settings, Untrained, build
from pipeline.core import artifacts, cli, progress
from pipeline.core.errors import GateFailed, UserError, nearest
from pipeline.core.machine import machine
from pipeline.core.students import Candidates
from pipeline.core.validation import schema_name

PATCH = 16  # of most ViT teachers: the default of --grid is a patch each of these pixels


def main(args: argparse.Namespace) -> None:
    """Build, measure, print and write. Raises UserError: nothing to measure; GateFailed: none fits the budget."""
    if args.source:
        document = pack.read_device(args.source)
    else:
        built = build_all(args)
        if args.pack:
            pack.write(args.pack, built, settings_of(args))
            print(
                f"{args.pack}: {sum(b.artefact is not None for b in built)} networks; {pack.ON_THE_DEVICE}"
            )
            return
        document = measured_here(args, built)
    known = ranking.imagenet_top1(args.results) if args.results else {}
    rows = [{**row, "imagenet_top1": known.get(row["model"])} for row in document["rows"]]
    document["rows"] = rows = ranking.rank(rows, args.budget_ms)
    document["budget_ms"] = args.budget_ms
    table.print_table(rows)
    if not any(row["status"] == "measured" for row in rows):
        raise UserError(f"no candidate could be measured: {rows[0]['name']}: {rows[0]['reason']}")
    print("\n".join(table.sentences(rows, args.budget_ms)))
    if args.json:
        artifacts.write_json(args.json, document)
    if reason := table.impossible(rows, args.budget_ms):
        raise GateFailed(reason)


def settings_of(args: argparse.Namespace) -> Settings:
    """What the candidates are built for."""
    grid = args.grid or max(1, args.image_size // PATCH)
    return Settings(args.target, args.image_size, args.classes, grid)


def build_all(args: argparse.Namespace) -> list[Untrained]:
    """Build every candidate, or read what was built before."""
    listed = candidates(args.students, args.strides)
    settings, built = settings_of(args), []
    with progress.Progress("networks", len(listed)) as bar:
        for i, candidate in enumerate(listed):
            built.append(build(candidate, settings, args.work))
            bar(i + 1)
    return built


def measured_here(args: argparse.Namespace, built: Sequence[Untrained]) -> dict[str, Any]:
    """Measure the candidates on this machine; a document with a row each."""
    target = TARGETS[args.target]
    protocol = rounds.Protocol(args.rounds, args.seconds / args.rounds)
    subjects = [(one, target) for one in built]
    return {
        "schema": schema_name(Candidates),
        "target": target.name,
        "threads": args.threads,
        "image_size": args.image_size,
        "rows": rounds.measured_rows(subjects, args.threads, protocol, args.work),
        "machine": machine(),
        "provenance": artifacts.provenance({**vars(settings_of(args)), **vars(protocol)}),
    }


def _above_zero(text: str) -> float:
    if not 0 < (value := float(text)) < float("inf"):
        raise argparse.ArgumentTypeError(f"got {text}; expected more than 0")
    return value


def _target(text: str) -> str:
    if text not in TARGETS:
        raise argparse.ArgumentTypeError(f"got {text!r}; {nearest(text, TARGETS)}")
    return text


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.candidates`."""
    p = argparse.ArgumentParser(prog="python -m exporters.candidates", description=__doc__)
    add = p.add_argument
    add(
        "--students",
        nargs="+",
        default=(),
        metavar="NAME",
        help=f"timm's CNNs, NAME:key=value,... with arguments, or families: {', '.join(FAMILIES)}; default: all",
    )
    add(
        "--strides",
        type=cli.count,
        nargs="+",
        default=(),
        metavar="N",
        help="each network with each of these output strides",
    )
    add("--target", type=_target, default="ort-fp32", metavar="NAME", help=", ".join(TARGETS))
    add("--budget-ms", type=_above_zero, metavar="MS", help="the p50 that a student may have")
    add("--image-size", type=cli.count, default=224, metavar="PX", help="default 224")
    add("--classes", type=cli.count, default=1000, metavar="N", help="logits, default 1000")
    add(
        "--grid",
        type=cli.count,
        metavar="N",
        help=f"rows and columns of the teacher's tokens, default image size / {PATCH}",
    )
    add("--threads", type=cli.count, default=1, metavar="N", help="default 1")
    add("--rounds", type=cli.count, default=Bench.rounds, help=f"default {Bench.rounds}")
    add(
        "--seconds",
        type=_above_zero,
        default=Bench.seconds_per_row,
        help="timed per candidate, default 3",
    )
    add(
        "--results",
        type=Path,
        metavar="CSV",
        help="timm's results-imagenet.csv, for the top-1 of each",
    )
    add("--json", type=Path, metavar="F", help="write the rows to F")
    add(
        "--work", type=Path, default=Path(".work/candidates"), help="networks and unfinished rounds"
    )
    mode = p.add_mutually_exclusive_group()
    mode.add_argument(
        "--pack", type=Path, metavar="DIR", help="write the networks and a runner for a device"
    )
    mode.add_argument(
        "--from",
        dest="source",
        type=Path,
        metavar="JSON",
        help="rank what `--bench-all` measured on a device",
    )
    return p


if __name__ == "__main__":
    cli.run(main, parser())
