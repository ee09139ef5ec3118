"""A ViT teacher and four students on CIFAR-100, by the recipe `cifar100`, as far as the time goes.

The recipe asks for 200 epochs. What fits is measured first: a few seconds of training give the images a second,
and with them the teacher's epochs, the views of each image in the store and the epochs of the students (the same
for all of them). The result lists what was chosen. In bfloat16, batch 256, the student channels_last.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import torch

from benchmarks import record
from benchmarks.gpu_parts.part import COMMAND, Part, Row, parser
from pipeline import teach
from pipeline.core import artifacts, cli, config, machine, progress
from pipeline.data.prepared import SPLITS, Prepared
from pipeline.distill import distill
from pipeline.distill.settings import Distill
from pipeline.distill.trainer import Trainer, build, train_step
from pipeline.evaluate import accuracy as evaluate_accuracy
from pipeline.evaluate.accuracy import Evaluate, predict
from pipeline.models import checkpoint, teacher
from pipeline.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.project import recipes
from pipeline.store import writing
from pipeline.store.policy import Cache
from pipeline.training import stopwatch
from pipeline.training.compute import Compute
from stages.check import SECTIONS

SCHEMA = "cakd.benchmark.gpu.cifar/1"
RESULT = "cifar"
RECIPES = Path("recipes")
RECIPE = "cifar100"
BATCH = 256
SHARES = {"teach": 0.4, "cache": 0.3, "distill": 0.85}  # of the time left when each begins
PROBE = 10 * BATCH  # images a rate is measured on
WARM_UP, STEPS = 3, 8  # of each student when its rate is measured
MAX_WORKERS = 8
T = TypeVar("T")


class Run:
    """The time, the folders, and the result so far, written after each step."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.out: Path = args.out / RESULT
        self.folder: Path = args.work / RESULT
        self.dry: bool = args.dry
        self.data: str = args.data or "none"
        self.end: float = time.monotonic() + args.seconds
        self.params = recipes.merged(RECIPE, RECIPES, SECTIONS, self.data)
        self.result: dict[str, Any] = {
            "recipe": RECIPE,
            "budget_s": args.seconds,
            "seconds": {},
            "chosen": {},
            "models": {},
        }

    def section(self, kind: type[T], **changes: Any) -> T:
        """A section of the recipe with a few changes."""
        name = kind.__name__.lower()
        settings: Any = config.parse(kind, self.params[name], name)
        parsed: T = replace(settings, **changes)
        return parsed

    def time_for(self, phase: str) -> float:
        """Seconds that a phase may take from now."""
        return SHARES[phase] * max(self.end - time.monotonic(), 0.0)

    def timed(self, phase: str, work: Callable[[], T]) -> T:
        """Run a phase, record its seconds, write the result."""
        start = time.perf_counter()
        value = work()
        self.result["seconds"][phase] = time.perf_counter() - start
        self.write()
        return value

    def choose(self, **figures: float) -> None:
        """Record settings that fit the time, and the rates they were chosen by."""
        self.result["chosen"] |= {name.replace("__", "."): v for name, v in figures.items()}

    def write(self) -> None:
        """Write the result so far."""
        text = "\n".join(
            ["| what | figure |", "|---|---|", *(f"| {a} | {b} |" for a, b in rows(self.result))]
        )
        made_by = artifacts.provenance({"recipe": RECIPE, "dry": self.dry, "batch": BATCH})
        command = f"{COMMAND} --parts cifar --data DIR"
        record.write(self.out, SCHEMA, self.result, made_by, command, text)


def fitting(seconds: float, seconds_each: float, most: int) -> int:
    """Return how many units of work fit into the time: 1 at least, `most` at most."""
    return max(1, min(most, int(seconds / seconds_each)))


def images(run: Run) -> Prepared:
    """Open the prepared folder, or prepare the parquet files, archive or class folders."""
    folder = Path(run.data)
    if run.dry:
        settings = Prepare("digits", image_size=32, val=100, test=1000)
    elif (folder / "index.json").is_file():
        return Prepared.open(folder)
    else:
        settings = run.section(Prepare, source=source_of(run.data), test=0.2)
    prepare.prepare(settings, run.folder / "prepared")
    return Prepared.open(run.folder / "prepared")


def source_of(path: str) -> str:
    """Detect the source at the path: `parquet`, `imagefolder` or `cifar`."""
    folder = Path(path)
    if path.endswith(".parquet") or set("*?[") & set(path) or any(folder.rglob("*.parquet")):
        return "parquet"
    return "imagefolder" if (folder / "train").is_dir() else "cifar"


def subset(prepared: Prepared, count: int) -> Prepared:
    """The same images with the first `count` of train alone left in train, to measure a rate on."""
    splits = prepared.splits.copy()
    splits[prepared.rows("train")[count:]] = "none"
    return replace(prepared, splits=splits)


def train_teacher(run: Run, prepared: Prepared) -> Path:
    """Train the ViT for the epochs that fit; return its weights."""
    settings = run.section(teach.Teach, batch=BATCH, precision="bf16")
    if run.dry:
        kwargs = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 2}
        settings = replace(settings, kwargs=kwargs, epochs=1, precision="fp32")
    else:
        n = len(prepared.rows("train"))
        seconds = teacher_rate(run, settings, subset(prepared, PROBE))
        epochs = fitting(run.time_for("teach"), seconds * n, settings.epochs)
        run.choose(teacher_img_per_s=1 / seconds, teach__epochs=epochs)
        settings = replace(settings, epochs=epochs)
    out = run.folder / "teacher"
    run.timed("teach", lambda: teach.teach(settings, prepared, out, run.folder / "work"))
    return out / "teacher.safetensors"


def teacher_rate(run: Run, settings: teach.Teach, few: Prepared) -> float:
    """Seconds an image: three epochs less one, so that building the model and the first steps do not count."""
    times = []
    for epochs in (1, 3):
        start = time.perf_counter()
        probe = replace(settings, epochs=epochs)
        teach.teach(probe, few, run.folder / "probe", run.folder / "work")
        times.append(time.perf_counter() - start)
    return max(times[1] - times[0], 1e-3) / (2 * len(few.rows("train")))


def write_store(run: Run, prepared: Prepared, path: Path) -> tuple[Path, Cache]:
    """Store the teacher's features for the views that fit."""
    settings = run.section(Cache, batch=BATCH)

    def write(views: int, of: Prepared, out: Path) -> None:
        bar = progress.Progress("cache", views * len(of.rows("train")))
        live = teacher.load(path)
        writing.write(replace(settings, views=views), of, live, out, run.folder / "work", bar)

    if run.dry:
        views = 1
    else:
        start = time.perf_counter()
        write(1, subset(prepared, PROBE), run.folder / "probe-store")
        seconds = (time.perf_counter() - start) / PROBE * len(prepared.rows("train"))
        views = fitting(run.time_for("cache"), seconds, settings.views)
        run.choose(cache__views=views)
    out = run.folder / "features"
    run.timed("cache", lambda: write(views, prepared, out))
    return out, replace(settings, views=views)


def student_settings(run: Run) -> Distill:
    """The recipe's settings of the students, for the device."""
    if run.dry:
        kwargs = {"channels": [8, 12, 16, 24], "output_stride": 8}
        changes = {"student": "test_resnet", "student_kwargs": kwargs, "steps": 4, "workers": 0}
        return run.section(Distill, batch=BATCH, **changes)
    workers = min(MAX_WORKERS, machine.usable_cores())
    how = Compute(precision="bf16", channels_last=True)
    return run.section(Distill, batch=BATCH, workers=workers, compute=how)


def student_rate(make: Callable[[], Trainer]) -> float:
    """Seconds a step of one student, the first steps not counted."""
    trainer = make()
    timer = stopwatch.Stopwatch(trainer.device)
    ends = []
    for step in range(WARM_UP + STEPS):
        train_step(trainer, step, timer)
        timer.wait()
        ends.append(time.perf_counter())
    trainer.feed.close()
    return (ends[-1] - ends[WARM_UP - 1]) / STEPS


def train_students(run: Run, prepared: Prepared, path: Path, features: Path, cache: Cache) -> None:
    """Train every method of the recipe for the steps that fit, the same for all, and evaluate each student."""
    settings, made = student_settings(run), (prepared, path, features, cache)
    if not run.dry:
        seconds = {
            method: student_rate(partial(build, settings, method, *made))
            for method in settings.methods
        }
        most = settings.step_count(len(prepared.rows("train")))
        steps = fitting(run.time_for("distill"), sum(seconds.values()), most)
        run.choose(distill__steps=steps, **{f"step_ms_{m}": 1e3 * s for m, s in seconds.items()})
        settings = replace(settings, steps=steps, epochs=None)
    for method in settings.methods:
        out = run.folder / "students" / method
        train = partial(distill.distill, settings, method, *made[:3], out, run.folder / "work")
        figures = run.timed(method, partial(train, cache))
        speed = {k: figures[k] for k in ("img_per_s", "stage_ms", "stall_fraction", "steps")}
        run.result["models"][method] = accuracy(run, out / "student.safetensors", prepared) | speed
        run.write()


def accuracy(run: Run, path: Path, prepared: Prepared) -> dict[str, Any]:
    """Top-1, top-5, nll and ECE on the test split, clean: the noises are drawn an image at a time on the CPU."""
    model, description = checkpoint.load(path)
    settings = run.section(Evaluate)
    rows = prepared.rows(settings.split)
    model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    pixels = prepared.images.squares(rows)
    logits = predict(model, pixels, description["preprocess"], batch=1000)
    labels = torch.from_numpy(prepared.labels[rows])
    return evaluate_accuracy.figures(logits, labels)


def main(args: argparse.Namespace) -> None:
    """Make images, teacher, store and students; the result is written after each."""
    run = Run(args)
    shutil.rmtree(run.folder, ignore_errors=True)
    run.folder.mkdir(parents=True)
    prepared = run.timed("prepare", lambda: images(run))
    run.result["data"] = {split: len(prepared.rows(split)) for split in SPLITS}
    path = train_teacher(run, prepared)
    run.result["models"]["teacher"] = accuracy(run, path, prepared)
    features, cache = write_store(run, prepared, path)
    train_students(run, prepared, path, features, cache)
    shutil.rmtree(features)
    shutil.rmtree(run.folder / "probe-store", ignore_errors=True)


def obstacle(args: argparse.Namespace) -> str | None:
    """The reason why there are no images: no --data and no dry run."""
    return None if args.data or args.dry else "no --data: the folder of CIFAR-100"


def rows(result: dict[str, Any]) -> list[Row]:
    """The settings that fit the time, and each model's accuracy and speed."""
    settings = ", ".join(f"{name} {value:g}" for name, value in result["chosen"].items())
    lines = [(f"{result['recipe']}, {result.get('data', {})}", settings or "nothing chosen")]
    for name, row in result["models"].items():
        text = f"top-1 {100 * row['top1']:.1f} %, top-5 {100 * row['top5']:.1f} %"
        if "img_per_s" in row:
            text += f", {row['img_per_s']['median']:.0f} img/s, waits {100 * row['stall_fraction']:.0f} %"
        lines.append((name, text))
    return lines


PART = Part(__name__, 4, [RESULT], rows, obstacle)

if __name__ == "__main__":
    cli.run(main, parser("benchmarks.gpu cifar", __doc__))
