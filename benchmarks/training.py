"""What a training step of each method costs over `plain`: `python -m benchmarks.training`. A table and its JSON.

Images and the teacher's weights are random, its features are stored first. The methods take turns, a step each,
on the same student; every ratio is of one turn, the first turn is not counted. With `--resident` they do so again
with batches that are already on the device, repeated: the difference is the cost of the loader. With
`--both-formats` every method takes two turns, the second with the student in channels_last.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks import record
from benchmarks.store import CLASSES, random_images, random_teacher
from pipeline.core import artifacts, cli
from pipeline.distill import curves, settings
from pipeline.distill.batches import BatchIndices
from pipeline.distill.feed import Batch, Feed, Views
from pipeline.distill.trainer import Trainer, build, train_step
from pipeline.models import teacher
from pipeline.store import writing
from pipeline.store.policy import Cache
from pipeline.training import stopwatch
from pipeline.training.compute import Compute

SCHEMA = "cakd.benchmark.training/1"
RESIDENT = 4  # steps whose batches lie on the device
METHODS = ("plain", "logits", "gl", "gl+pca", "cakd", "cakd+logits")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Parts of a step in ms of every method, and its time over that of the first in the same turn.

    `methods` with the batches of the loader; `resident`, where it is requested, with batches that already lie on
    the device.
    """
    with tempfile.TemporaryDirectory() as name:
        trainers = make_trainers(args, Path(name))
        result = {"methods": take_turns(trainers, args, range(args.steps))}
        if args.resident:
            on_device = {method: resident(trainer) for method, trainer in trainers.items()}
            result["resident"] = take_turns(on_device, args, range(args.steps, 2 * args.steps))
    return result


def make_trainers(args: argparse.Namespace, folder: Path) -> dict[str, Trainer]:
    """A trainer for each method on the same images, teacher and store, all of them written to `folder`."""
    prepared = random_images(folder, args.images + 2 * CLASSES, args.size)
    path = folder / "teacher.safetensors"
    random_teacher(args.teacher, prepared, path, patch_size=args.patch)
    cache = Cache(views=1, batch=args.batch)
    live = teacher.load(path)
    writing.write(cache, prepared, live, folder / "store", folder / "work", lambda _: None)
    recipe = settings.Distill(
        methods=tuple(args.methods),
        student=args.student,
        student_kwargs={"output_stride": args.stride} if args.stride else {},
        batch=args.batch,
        steps=1_000_000,
        workers=args.workers,
        compute=Compute(precision=args.precision, channels_last=args.channels_last),
    )
    recipes = {"": recipe}
    if args.both_formats:
        last = replace(recipe.compute, channels_last=True)
        recipes[" channels_last"] = replace(recipe, compute=last)
    return {
        f"{method}{name}": build(own, method, prepared, path, folder / "store", cache)
        for method in args.methods
        for name, own in recipes.items()
    }


class ResidentViews(Views):
    """The batches of RESIDENT steps, repeated, their views on the device: a step without the loader's share."""

    def __init__(self, views: Views, device: torch.device) -> None:
        super().__init__(views.batches, views.micro_batches, views.ranks)
        self._resident = [
            [replace(batch, views=batch.views.to(device)) for batch in views[step]]
            for step in range(RESIDENT)
        ]

    def indices(self, step: int) -> list[BatchIndices]:
        """Return the indices of the micro-batches of this step."""
        return super().indices(step % RESIDENT)

    def __getitem__(self, step: int) -> list[Batch]:
        return self._resident[step % RESIDENT]


def resident(trainer: Trainer) -> Trainer:
    """Continue a trainer that has made a step with batches that are on its device."""
    features = trainer.feed.features
    if features is not None:  # views on a device are not hashed; the loader's were
        features.CHECK_EVERY = sys.maxsize
    views = ResidentViews(trainer.feed.views, trainer.device)
    return replace(trainer, feed=Feed(views, features, workers=0))


def take_turns(
    trainers: dict[str, Trainer], args: argparse.Namespace, turns: range
) -> dict[str, Any]:
    """A step of every method in each turn, the first turn not counted; the figures of each method."""
    timers = {m: stopwatch.Stopwatch(trainer.device) for m, trainer in trainers.items()}
    walls: dict[str, list[float]] = {method: [] for method in trainers}
    for turn in turns:
        for method, trainer in trainers.items():
            start = time.perf_counter()
            train_step(trainer, turn, timers[method])
            timers[method].wait()
            walls[method].append(1e3 * (time.perf_counter() - start))
    for trainer in trainers.values():
        trainer.feed.close()
    steps = {m: [s for s in timer.steps if s][1:] for m, timer in timers.items()}
    totals = {m: [sum(s.values()) for s in rows] for m, rows in steps.items()}
    result = {}
    for method, rows in steps.items():
        ratios = [a / b for a, b in zip(totals[method], totals[next(iter(totals))], strict=True)]
        wall = quartiles(walls[method][1:])
        result[method] = {
            "over_first": quartiles(ratios),
            "stage_ms": {n: statistics.median(s.get(n, 0.0) for s in rows) for n in curves.STAGES},
            "img_per_s": 1e3 * args.batch / statistics.median(totals[method]),
            "wall_ms": wall,
            "wall_img_per_s": 1e3 * args.batch / wall["median"],
        }
    return result


def quartiles(values: list[float]) -> dict[str, float]:
    """Median and quartiles of two values or more."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "p25": low, "p75": high}


def table(result: dict[str, Any]) -> str:
    """The Markdown tables: with the loader's batches, and with resident ones where they were measured."""
    tables = [feed_table(result["methods"])]
    if "resident" in result:
        tables += ["Batches resident on the device:", feed_table(result["resident"])]
    return "\n\n".join(tables)


def feed_table(methods: dict[str, Any]) -> str:
    """Each method's step over the first one's, and the share of every part in that."""
    whole = sum(next(iter(methods.values()))["stage_ms"].values())
    first = next(iter(methods))
    parts = [p for p in curves.STAGES if any(row["stage_ms"][p] for row in methods.values())]
    lines = [
        f"| method | step / {first} (quartiles) | " + " | ".join(parts) + " |",
        "|---|--:|" + "--:|" * len(parts),
    ]
    for method, row in methods.items():
        over = row["over_first"]
        cells = " | ".join(f"{row['stage_ms'][p] / whole:.2f}" for p in parts)
        spread = f"{over['median']:.2f} ({over['p25']:.2f} to {over['p75']:.2f})"
        lines.append(f"| {method} | {spread} | {cells} |")
    lines += ["", f"Parts in steps of {first}."]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    result = measure(args)
    text = table(result)
    print(text)
    if args.out is None:
        return
    save(args, result, text)


def save(args: argparse.Namespace, result: dict[str, Any], text: str) -> None:
    """Write `<out>.json` and `<out>.md`."""
    params = {k: v for k, v in vars(args).items() if k != "out"}
    command = "python -m benchmarks.training " + " ".join(
        f"--{k.replace('_', '-')}" if v is True else f"--{k} {' '.join(v) if k == 'methods' else v}"
        for k, v in params.items()
        if v is not False
    )
    record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__)
    made.add_argument("--methods", nargs="+", default=list(METHODS))
    made.add_argument("--teacher", default="vit_tiny_patch16_224")
    made.add_argument("--patch", type=int, default=4)
    made.add_argument("--student", default="resnet18")
    made.add_argument(
        "--stride", type=int, default=8, help="timm's output_stride of the student; 0: its own"
    )
    made.add_argument("--size", type=int, default=32)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--images", type=int, default=256)
    made.add_argument("--steps", type=int, default=16)
    made.add_argument("--workers", type=int, default=0)
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    made.add_argument("--channels-last", action="store_true")
    made.add_argument(
        "--both-formats", action="store_true", help="every method again in channels_last"
    )
    made.add_argument(
        "--resident", action="store_true", help="then again with batches that lie on the device"
    )
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
