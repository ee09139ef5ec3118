"""A training step with cached features against the same step with the teacher running: `benchmarks.store step`.

Both take turns in one run, on random images with a teacher of random weights. Only the ratios count; the machine
is recorded beside them.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks import record
from exporters.artifact.inputs import smooth
from pipeline.core import artifacts, cli
from pipeline.data.prepared import Prepared
from pipeline.distill import curves, settings
from pipeline.distill.trainer import Trainer, build, train_step
from pipeline.models import checkpoint, probe, teacher
from pipeline.prepare.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.store import writing
from pipeline.store.policy import Cache
from pipeline.training import stopwatch

SCHEMA = "cakd.benchmark.store/1"
CLASSES = 10
WARM_UP = 1  # turns that are not counted


def random_images(folder: Path, count: int, size: int) -> Prepared:
    """Prepare `count` smooth random images of `size` px in CLASSES classes."""
    pixels = (smooth(count, size, size).transpose(0, 2, 3, 1) * 40 + 128).clip(0, 255)
    for number, image in enumerate(pixels.astype(np.uint8)):
        path = folder / "pictures" / f"class-{number % CLASSES}" / f"{number:05d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    config = Prepare(
        "imagefolder", path=str(folder / "pictures"), image_size=size, val=CLASSES, test=CLASSES
    )
    prepare(config, folder / "prepared")
    return Prepared.open(folder / "prepared")


def random_teacher(name: str, prepared: Prepared, path: Path, **kwargs: Any) -> Path:
    """Save a teacher with random weights as the stage teach does; kwargs are timm's."""
    torch.manual_seed(0)
    kwargs = {"img_size": prepared.image_size, **kwargs}
    vit: Any = checkpoint.create(name, kwargs, CLASSES)
    description = {
        "role": "teacher",
        "model": name,
        "kwargs": kwargs,
        "num_classes": CLASSES,
        "classes": list(prepared.classes),
        "preprocess": checkpoint.preprocessing(vit, prepared.image_size),
        "grid": probe.probe_teacher(vit, prepared.image_size).grid,
    }
    checkpoint.save(path, vit, description)
    return path


def recipe(args: argparse.Namespace, method: str) -> settings.Distill:
    """The training of one method, as long as the benchmark likes."""
    return settings.Distill(
        methods=(method,),
        student=args.student,
        batch=args.batch,
        steps=1_000_000,
        workers=args.workers,
        labelled_share=0.0,  # every image meets the teacher, as in the arithmetic of docs/store.md
    )


def policies(args: argparse.Namespace) -> dict[str, Cache]:
    """`cached` and `online`, of the same views."""
    cached = Cache(mode="on", dtype=args.dtype, views=1, batch=args.batch)
    return {"cached": cached, "online": replace(cached, mode="off")}


@contextmanager
def trainers(args: argparse.Namespace) -> Iterator[dict[str, Trainer]]:
    """Build the same training twice: `cached` from a store written here, `online` with the teacher running."""
    with tempfile.TemporaryDirectory(dir=args.folder) as name:
        folder = Path(name)
        prepared = random_images(folder, args.images + 2 * CLASSES, args.size)
        path = random_teacher(args.teacher, prepared, folder / "teacher.safetensors")
        live = teacher.load(path)
        made = {}
        for mode, policy in policies(args).items():
            out = folder / mode
            writing.write(policy, prepared, live, out, folder / "work", lambda _: None)
            training = recipe(args, args.method)
            made[mode] = build(training, args.method, prepared, path, out, policy)
        yield made
        for trainer in made.values():
            trainer.feed.close()


def step(args: argparse.Namespace) -> dict[str, Any]:
    """Milliseconds of each part of a step, cached and online in turns; difference of their first losses."""
    with trainers(args) as made:
        timers = {mode: stopwatch.Stopwatch() for mode in made}
        losses: dict[str, dict[str, float]] = {}
        for turn in range(WARM_UP + args.turns):
            for mode, trainer in made.items():
                figures = train_step(trainer, turn, timers[mode])
                losses.setdefault(mode, {name: float(value) for name, value in figures.items()})
        features = made["cached"].feed.features
        assert features is not None
        manifest = features.store.manifest
        error = max(manifest["error"].values())
        bytes_per_view = manifest["bytes_per_view"]
    steps = {mode: [s for s in timer.steps if s][WARM_UP:] for mode, timer in timers.items()}
    totals = {mode: [sum(s.values()) for s in rows] for mode, rows in steps.items()}
    ratios = [b / a for a, b in zip(totals["cached"], totals["online"], strict=True)]
    waiting = sum(s.get("read", 0.0) + s.get("view", 0.0) for s in steps["cached"])
    return {
        "bytes_per_view": bytes_per_view,
        "stage_ms": {
            mode: {n: statistics.median(s.get(n, 0.0) for s in rows) for n in curves.STAGES}
            for mode, rows in steps.items()
        },
        "step_ms": {mode: statistics.median(rows) for mode, rows in totals.items()},
        "online_over_cached": {
            "median": statistics.median(ratios),
            "min": min(ratios),
            "max": max(ratios),
        },
        "stall_fraction": waiting / sum(totals["cached"]),
        "manifest_error": error,
        "first_loss_relative_difference": {
            term: abs(losses["cached"][term] / value - 1)
            for term, value in losses["online"].items()
            if value
        },
    }


def step_table(result: dict[str, Any]) -> str:
    """The Markdown table of `step`."""
    lines = [
        "| part of a step | cached (share of its step) | online, in cached steps |",
        "|---|--:|--:|",
    ]
    whole = result["step_ms"]["cached"]
    for part in curves.STAGES:
        cached, online = (result["stage_ms"][mode][part] / whole for mode in ("cached", "online"))
        if cached or online:
            lines.append(f"| {part} | {100 * cached:.1f} % | {online:.3f} |")
    ratio = result["online_over_cached"]
    lines += [
        "",
        f"An online step takes {ratio['median']:.2f} cached ones (turns: {ratio['min']:.2f} to "
        f"{ratio['max']:.2f}); a cached step waits for data {100 * result['stall_fraction']:.2f} % of its time; "
        f"{result['bytes_per_view'] / 1e6:.3f} MB a view.",
        "",
        "First losses, cached against online, relative: "
        + ", ".join(f"{k} {v:.1e}" for k, v in result["first_loss_relative_difference"].items())
        + f"; the manifest's error {result['manifest_error']:.1e}.",
    ]
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`."""
    result = step(args)
    text = step_table(result)
    print(text)
    if args.out is None:
        return
    params = {k: v for k, v in vars(args).items() if k not in ("out", "folder")}
    options = " ".join(f"--{k} {v}" for k, v in params.items() if k != "what")
    command = f"python -m benchmarks.store {args.what} {options}"
    record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(prog="benchmarks.store", description=__doc__)
    whole.add_argument("--folder", type=Path, help="where to work; the disk that is measured")
    whole.add_argument("--out", type=Path, help="where to write, without suffix")
    kinds = whole.add_subparsers(dest="what", required=True)
    steps = kinds.add_parser("step", help="a cached training step against an online one")
    steps.add_argument("--teacher", default="vit_base_patch16_224")
    steps.add_argument("--student", default="resnet18")
    steps.add_argument("--method", default="cakd+logits")
    steps.add_argument("--size", type=int, default=224)
    steps.add_argument("--batch", type=int, default=16)
    steps.add_argument("--images", type=int, default=64)
    steps.add_argument("--turns", type=int, default=6)
    steps.add_argument("--workers", type=int, default=1)
    steps.add_argument("--dtype", default="float16")
    return whole


if __name__ == "__main__":
    cli.run(main, parser())
