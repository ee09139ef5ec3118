"""What a training step of each method costs over `plain`: `python -m benchmarks.training`. A table and its JSON.

Everything is made on the spot: random pictures, a teacher with random weights, its features in a store. The
methods take turns, a step each, on the same student; every ratio is of one turn, the first turn is not counted.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import record
from benchmarks.store import CLASSES, pictures, random_teacher
from pipeline import cli, files, runtime, teacher, training
from pipeline.compute import Compute
from pipeline.store import writing
from pipeline.store.policy import Cache

SCHEMA = "cakd.benchmark.training/1"
METHODS = ("plain", "logits", "gl", "gl+pca", "cakd", "cakd+logits")


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Of every method the parts of a step in ms, and its time over that of `plain` in the same turn."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepared = pictures(folder, args.images + 2 * CLASSES, args.size)
        path = folder / "teacher.safetensors"
        random_teacher(args.teacher, prepared, path, patch_size=args.patch)
        cache = Cache(views=1, batch=args.batch)
        live = teacher.load(path)
        writing.write(cache, prepared, live, folder / "store", folder / "work", lambda _: None)
        recipe = training.Distill(
            methods=tuple(args.methods),
            student=args.student,
            student_kwargs={"output_stride": args.stride},
            batch=args.batch,
            epochs=10_000,
            workers=args.workers,
            compute=Compute(precision=args.precision, channels_last=args.channels_last),
        )
        made = {
            method: training.Trainer(recipe, method, prepared, path, folder / "store", cache)
            for method in args.methods
        }
        watches = {m: runtime.Stopwatch(trainer.place) for m, trainer in made.items()}
        for turn in range(args.steps):
            for method, trainer in made.items():
                trainer.step(turn, watches[method])
        for trainer in made.values():
            trainer.feed.close()
    steps = {m: [s for s in watch.steps if s][1:] for m, watch in watches.items()}
    totals = {m: [sum(s.values()) for s in rows] for m, rows in steps.items()}
    found = {}
    for method, rows in steps.items():
        ratios = [a / b for a, b in zip(totals[method], totals[args.methods[0]], strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        found[method] = {
            "over_first": {"median": statistics.median(ratios), "p25": low, "p75": high},
            "stage_ms": {
                n: statistics.median(s.get(n, 0.0) for s in rows) for n in training.STAGES
            },
            "img_per_s": 1e3 * args.batch / statistics.median(totals[method]),
        }
    return {"methods": found}


def table(found: dict[str, Any]) -> str:
    """The Markdown table: each method's step over the first one's, and the share of every part in that."""
    methods = found["methods"]
    whole = sum(next(iter(methods.values()))["stage_ms"].values())
    first = next(iter(methods))
    parts = [p for p in training.STAGES if any(row["stage_ms"][p] for row in methods.values())]
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
    found = measure(args)
    shown = table(found)
    print(shown)
    if args.out is None:
        return
    asked = {k: v for k, v in vars(args).items() if k != "out"}
    command = "python -m benchmarks.training " + " ".join(
        f"--{k.replace('_', '-')}" if v is True else f"--{k} {' '.join(v) if k == 'methods' else v}"
        for k, v in asked.items()
        if v is not False
    )
    record.write(args.out, SCHEMA, found, files.provenance(asked), command, shown)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="benchmarks.training", description=__doc__)
    made.add_argument("--methods", nargs="+", default=list(METHODS))
    made.add_argument("--teacher", default="vit_tiny_patch16_224")
    made.add_argument("--patch", type=int, default=4)
    made.add_argument("--student", default="resnet18")
    made.add_argument("--stride", type=int, default=8, help="timm's output_stride of the student")
    made.add_argument("--size", type=int, default=32)
    made.add_argument("--batch", type=int, default=64)
    made.add_argument("--images", type=int, default=256)
    made.add_argument("--steps", type=int, default=16)
    made.add_argument("--workers", type=int, default=0)
    made.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    made.add_argument("--channels-last", action="store_true")
    made.add_argument("--out", type=Path, help="where to write, without suffix")
    return made


if __name__ == "__main__":
    cli.run(main, parser())
