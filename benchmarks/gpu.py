"""All measurements that need a CUDA device: `python -m benchmarks.gpu [--minutes 8] [--out DIR]`.

The parts run one after the other, most valuable first, each a process with its own time limit: `tests` (parity,
determinism, no waiting, graph capture), `kernels` (every provider against the roofline), `steps` (whole training
steps), `cifar` (teacher and students on CIFAR-100, needs `--data`), `engine` (TensorRT-RTX). A part leaves JSON, a
table and a log in --out; one that fails or is killed leaves what it had written, and the next one runs. The
summary is written after each part and printed last. `--dry` runs every part small on the CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.gpu_parts import cifar, engine, kernel_table, kernel_tests, processes, steps
from benchmarks.gpu_parts.part import COMMAND, Part, cell
from benchmarks.gpu_parts.processes import Outcome
from pipeline.core import artifacts, cli
from pipeline.core.errors import GateFailed, UserError

SCHEMA = "cakd.benchmark.gpu/1"
SUMMARY = "summary"
PARTS: dict[str, Part] = {
    "tests": kernel_tests.PART,
    "kernels": kernel_table.PART,
    "steps": steps.PART,
    "cifar": cifar.PART,
    "engine": engine.PART,
}
MARGIN = 5.0  # seconds for ending a part and writing the summary
SLACK = 8.0  # seconds between the budget of a part and its limit


def main(args: argparse.Namespace) -> None:
    """Run the parts, print the summary. Raises GateFailed where a part failed."""
    if not args.dry and not torch.cuda.is_available():
        raise UserError(
            f"CUDA: got no device in torch {torch.__version__}; expected one; run on a machine with a GPU, or "
            "with --dry, which runs every part small on the CPU"
        )
    if args.data and not exists(args.data):
        raise UserError(f"--data: {args.data}: no such folder; expected CIFAR-100; correct it")
    deadline = time.monotonic() + 60 * args.minutes - MARGIN
    args.out.mkdir(parents=True, exist_ok=True)
    args.work.mkdir(parents=True, exist_ok=True)
    clear(args.out, args.parts)
    outcomes = {name: obstructed(name, args) for name in args.parts}
    for name, skipped in outcomes.items():
        if skipped is None:
            left = [n for n in args.parts if outcomes[n] is None]
            limit = limit_of(name, left, deadline - time.monotonic())
            print(f"{name}: {limit:.0f} s at most", flush=True)
            outcomes[name] = run_part(name, args, limit)
        summary = summarise({n: o for n, o in outcomes.items() if o is not None}, args)
        write(summary, args)
    print(table(summary))
    failed = [n for n, o in outcomes.items() if o is not None and o.status == "failed"]
    if failed:
        raise GateFailed(f"failed: {', '.join(failed)}; their logs are in {args.out}")


def exists(data: str) -> bool:
    """Whether a path is there, or a pattern matches something."""
    return Path(data).exists() or any(Path(data).parent.glob(Path(data).name or "*"))


def clear(out: Path, names: Sequence[str]) -> None:
    """Remove an earlier run's results of these parts, so that none of them is taken for this run's."""
    for stem in (SUMMARY, *names, *(r for n in names for r in PARTS[n].results)):
        for suffix in (".json", ".md", ".log"):
            (out / f"{stem}{suffix}").unlink(missing_ok=True)


def obstructed(name: str, args: argparse.Namespace) -> Outcome | None:
    """The outcome of a part that cannot run here, else None."""
    reason = PARTS[name].obstacle(args)
    return None if reason is None else Outcome("skipped", reason=reason)


def limit_of(name: str, left: Sequence[str], seconds: float) -> float:
    """This part's share, by weight, of the time that is left for it and the parts after it."""
    return max(seconds, 0.0) * PARTS[name].weight / sum(PARTS[n].weight for n in left)


def run_part(name: str, args: argparse.Namespace, limit: float) -> Outcome:
    """Run one part as a process, on the device or, dry, where no device is visible."""
    budget = max(limit - SLACK, 1.0)
    command = [sys.executable, "-m", PARTS[name].module, str(args.out), "--work", str(args.work)]
    command += ["--seconds", f"{budget:.1f}"]
    command += ["--data", args.data] if args.data else []
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    if args.dry:
        command.append("--dry")
        environment["CUDA_VISIBLE_DEVICES"] = ""
    return processes.run(command, args.out / f"{name}.log", limit, environment)


def summarise(outcomes: dict[str, Outcome], args: argparse.Namespace) -> dict[str, Any]:
    """The outcome of each part, with the rows of the results it wrote."""
    parts: dict[str, Any] = {}
    for name, outcome in outcomes.items():
        part = PARTS[name]
        paths = [args.out / f"{stem}.json" for stem in part.results]
        results = [artifacts.read_json(path) for path in paths if path.is_file()]
        rows = [row for result in results for row in part.rows(result)]
        parts[name] = {**asdict(outcome), "rows": [list(row) for row in rows]}
    return {"dry": args.dry, "minutes": args.minutes, "parts": parts}


def write(summary: dict[str, Any], args: argparse.Namespace) -> None:
    """Write `summary.json` and `summary.md`."""
    params = {"parts": args.parts, "minutes": args.minutes, "dry": args.dry}
    command = f"{COMMAND} --minutes {args.minutes:g}{' --data DIR' if args.data else ''}"
    command += " --dry" if args.dry else ""
    provenance = artifacts.provenance(params)
    record.write(args.out / SUMMARY, SCHEMA, summary, provenance, command, table(summary))


def table(summary: dict[str, Any]) -> str:
    """One Markdown table: a line for each part, and one for each of its rows."""
    lines = ["| part | what | figure |", "|---|---|---|"]
    for name, part in summary["parts"].items():
        status = f"{part['status']}, {part['seconds']:.0f} s"
        lines.append(f"| **{name}** | {status} | {cell(part['reason'] or '')} |")
        lines += [f"| {name} | {cell(what)} | {cell(figure)} |" for what, figure in part["rows"]]
    head = "Dry run, small and on the CPU: the figures mean nothing.\n\n" if summary["dry"] else ""
    return f"{head}" + "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.gpu", description=__doc__)
    add = made.add_argument
    add("--minutes", type=float, default=8.0, help="for all parts together; default 8")
    add("--out", type=Path, default=Path(".work/gpu"), help="folder of the results")
    add("--work", type=Path, default=Path(".work/gpu-work"), help="folder of models and features")
    add("--data", help="CIFAR-100: a prepared folder, parquet files or the archive")
    add("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="only these")
    add("--dry", action="store_true", help="every part small on the CPU, without a device")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
