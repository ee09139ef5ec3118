"""A training step with cached features against other distillation packages: `python -m benchmarks.peers`.

torchdistill, timm's distillation tasks, LightlyTrain and a plain loop train the same student with the same running
teacher; ours does so with the teacher running and from its cache. Each peer is a process that waits for its turn
(`benchmarks/peer_parts/worker.py`); all take turns, a step each, on one thread. The ratios are of CPU seconds in
one round. A peer that is not installed, fails or does not answer is a row with the reason.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.peer_parts import worker as peer_worker
from benchmarks.peer_parts.process import Measured, PeerError, Worker
from benchmarks.peer_parts.table import table
from benchmarks.store import CLASSES, policies, random_images, random_teacher, recipe
from pipeline.core import artifacts, cli
from pipeline.core.errors import UserError
from pipeline.distill.trainer import Trainer, build, train_step
from pipeline.models import teacher
from pipeline.store import writing
from pipeline.training import stopwatch

SCHEMA = "cakd.benchmark.peers/1"
METHODS = ("logits", "cakd+logits")
DATA = ("view", "read")  # stages of our step
PACKAGES = {package: system for system, (package, _) in peer_worker.SYSTEMS.items()}


@dataclass
class Row:
    """One method of one system: `steps` makes as many of its steps as requested."""

    system: str
    method: str
    steps: Callable[[int], Measured] | None
    reason: str = ""
    rounds: list[Measured] = field(default_factory=list)


@contextmanager
def peers(
    args: argparse.Namespace, folder: Path, versions: dict[str, dict[str, str]]
) -> Iterator[list[Row]]:
    """Start the peers and wait until their steps are built; `versions` gets their packages."""
    with ExitStack() as stack:
        workers = {}
        for system, (package, methods) in peer_worker.SYSTEMS.items():
            config = {
                **{key: getattr(args, key) for key in ("teacher", "student", "size", "batch")},
                "threads": args.threads,
                "classes": CLASSES,
                "weights": str(folder / "teacher.safetensors"),
                "images": str(folder / "pictures"),
                "system": system,
                "methods": list(methods),
            }
            # Isolated: neither our PYTHONPATH nor the modules beside the script reach the peer.
            command = [args.env.get(package, sys.executable), "-I", peer_worker.__file__]
            worker = Worker(
                [*command, json.dumps(config)],
                args.threads,
                folder / f"{package}.log",
                args.timeout,
            )
            stack.callback(worker.close)
            workers[system] = worker
        rows = []
        for system, (_, methods) in peer_worker.SYSTEMS.items():
            try:
                ready = workers[system].answer()
            except PeerError as error:
                ready = {"failed": dict.fromkeys(methods, str(error))}
            if "not_installed" in ready:
                ready["failed"] = dict.fromkeys(methods, f"not installed: {ready['not_installed']}")
            versions[system] = ready.get("versions", {})
            rows += [peer_row(workers[system], system, m, ready["failed"]) for m in methods]
        yield rows


def peer_row(worker: Worker, system: str, method: str, failed: dict[str, str]) -> Row:
    """The row of a peer's method; without steps where it could not be built."""
    if method in failed:
        return Row(system, method, None, failed[method])
    return Row(system, method, lambda count: worker.steps(method, count))


def our_steps(trainer: Trainer) -> Callable[[int], Measured]:
    """Our own steps, measured as the peers'."""
    timer, numbers = stopwatch.Stopwatch(), itertools.count()

    def steps(count: int) -> Measured:
        before = len(timer.steps) - 1
        wall, cpu = time.perf_counter(), time.process_time()
        for number in itertools.islice(numbers, count):
            train_step(trainer, number, timer)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        data = sum(stages.get(s, 0.0) for stages in timer.steps[before:] for s in DATA) / 1e3
        images = float(trainer.config.batch * count)
        return {"images": images, "wall_s": wall, "data_s": data, "cpu_s": cpu}

    return steps


def ours(args: argparse.Namespace, folder: Path) -> tuple[list[Row], dict[str, float]]:
    """Our rows, and the CPU seconds of writing: of a view, and of the statistics that both modes need."""
    prepared = random_images(folder, args.images + 2 * CLASSES, args.size)
    path = random_teacher(args.teacher, prepared, folder / "teacher.safetensors")
    live = teacher.load(path)
    seconds, rows = {}, []
    for mode, policy in policies(args).items():
        start = time.process_time()
        writing.write(policy, prepared, live, folder / mode, folder / "work", lambda _: None)
        seconds[mode] = time.process_time() - start
        for method in args.methods:
            # As with the peers, the teacher's answer is compared for every image of a batch.
            training = recipe(args, method)
            trainer = build(training, method, prepared, path, folder / mode, policy)
            steps = our_steps(trainer)
            steps(1)  # as the peers do: not counted
            rows.append(Row(f"ours, {mode}", method, steps))
    return rows, {
        "cpu_s_per_view": (seconds["cached"] - seconds["online"]) / args.images,
        "statistics_cpu_s": seconds["online"],
        "statistics_images": min(args.images, writing.STATISTICS),
    }


def take_turns(rows: list[Row], rounds: int, steps: int) -> None:
    """Make `steps` steps of every row in each round; all have made their first step."""
    for _ in range(rounds):
        for row in rows:
            if row.steps is None:
                continue
            try:
                measured = row.steps(steps)
            except PeerError as error:
                row.steps, row.reason, row.rounds = None, str(error), []
                continue
            row.rounds.append(measured)


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """The rounds of every row, and their summary."""
    threads, before = torch.get_num_threads(), os.getloadavg()
    torch.set_num_threads(args.threads)
    versions: dict[str, dict[str, str]] = {}
    try:
        with tempfile.TemporaryDirectory(dir=args.folder) as name:
            folder = Path(name)
            rows, cost = ours(args, folder)
            with peers(args, folder, versions) as others:
                rows += others
                take_turns(rows, args.rounds, args.steps)
    finally:
        torch.set_num_threads(threads)
    return {
        "rows": summaries(rows, args.methods),
        "writing": cost,
        "versions": versions,
        "dtype": args.dtype,
        "load_average": {"before": before[0], "after": os.getloadavg()[0]},
    }


def summaries(rows: list[Row], methods: list[str]) -> list[dict[str, Any]]:
    """Medians of the rounds of every row, and of its CPU time over ours from the cache in the same round."""
    cached = {
        method: cpu_per_image(row.rounds)
        for method in methods
        for row in rows
        if (row.system, row.method) == ("ours, cached", method)
    }
    result: list[dict[str, Any]] = []
    for row in rows:
        entry: dict[str, Any] = {"system": row.system, "method": row.method}
        result.append(entry)
        if row.steps is None:
            entry["reason"] = row.reason
            continue
        cpu = cpu_per_image(row.rounds)
        entry |= {
            "img_per_s": statistics.median(r["images"] / r["wall_s"] for r in row.rounds),
            "img_per_s_without_data": statistics.median(
                r["images"] / (r["wall_s"] - r["data_s"]) for r in row.rounds
            ),
            "cpu_s_per_100_images": 100 * statistics.median(cpu),
            "cpu_over_cached": {
                method: statistics.median(a / b for a, b in zip(cpu, own, strict=True))
                for method, own in cached.items()
            },
            "rounds": row.rounds,
        }
    return result


def cpu_per_image(rounds: list[Measured]) -> list[float]:
    """CPU seconds of an image in every round."""
    return [r["cpu_s"] / r["images"] for r in rounds]


def environment(text: str) -> tuple[str, str]:
    """Parse --env. Raises UserError: no such package or interpreter."""
    package, _, python = text.partition("=")
    if package not in PACKAGES:
        raise UserError(
            f"--env: got {text!r}; expected PACKAGE=PYTHON with a package of {', '.join(PACKAGES)}; correct it"
        )
    path = Path(python).expanduser()
    if not path.is_file() or not os.access(path, os.X_OK):
        raise UserError(
            f"--env: {python or text!r}: no such program; expected the python of an environment with {package}; "
            "correct the path"
        )
    return package, str(path)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    args.env = dict(environment(text) for text in args.env)
    result = measure(args)
    text = table(result)
    print(text)
    if args.out is None:
        return
    params = {k: v for k, v in vars(args).items() if k not in ("out", "folder", "env", "workers")}
    options = [f"--{k} {' '.join(v) if k == 'methods' else v}" for k, v in params.items()]
    options += [f"--env {package}=PYTHON" for package in args.env]
    command = f"python -m benchmarks.peers {' '.join(options)}"
    record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(prog="benchmarks.peers", description=__doc__)
    line.add_argument("--teacher", default="vit_base_patch16_224")
    line.add_argument("--student", default="resnet18")
    line.add_argument("--methods", nargs="+", default=list(METHODS), help="of ours")
    line.add_argument("--size", type=int, default=224)
    line.add_argument("--batch", type=int, default=16)
    line.add_argument("--images", type=int, default=64)
    line.add_argument("--rounds", type=int, default=11)
    line.add_argument("--steps", type=int, default=1, help="of every row in a round")
    line.add_argument("--threads", type=int, default=1)
    line.add_argument("--dtype", default="float16", help="of the cache")
    line.add_argument("--timeout", type=float, default=600, help="seconds for an answer of a peer")
    line.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="PACKAGE=PYTHON",
        help="the interpreter that has torchdistill or lightly-train; once for each",
    )
    line.add_argument("--folder", type=Path, help="where to work")
    line.add_argument("--out", type=Path, help="where to write, without suffix")
    # Views are made in this process, so that their CPU time counts.
    line.set_defaults(workers=0)
    return line


if __name__ == "__main__":
    cli.run(main, parser())
