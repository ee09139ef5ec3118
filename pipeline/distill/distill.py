"""The loop of Algorithm 1: student and projectors every iteration, the discriminator every fifth.

Only the student is published. Every draw is a function of (seed, step), so a killed run goes on to the same bits.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from pipeline.core import artifacts, progress
from pipeline.core.atomic import atomic_dir
from pipeline.data.prepared import Prepared
from pipeline.distill.curves import summarise
from pipeline.distill.methods.table import terms_of
from pipeline.distill.settings import Distill
from pipeline.distill.trainer import Trainer, build, train_step
from pipeline.models import checkpoint
from pipeline.store.policy import Cache
from pipeline.training import loop, resume
from pipeline.training.ranks import SINGLE_PROCESS, Ranks
from pipeline.training.stopwatch import Stopwatch

# Settings that change nothing in this training.
OF_OTHERS = ("methods", "students", "tuned", "workers")
TIMED = 10  # on a GPU one step in so many is timed
# Rooms of pipeline/ whose code makes a student: an edit there starts an unfinished training anew.
ROOMS = ("core", "data", "distill", "models", "store", "training")


def distill(
    config: Distill,
    method: str,
    prepared: Prepared,
    teacher_path: Path,
    features: Path,
    out: Path,
    work: Path,
    policy: Cache | None = None,
    ranks: Ranks = SINGLE_PROCESS,
) -> dict[str, Any]:
    """Train one student by one method, publish it at `out`, return the figures of train/<method>.json.

    `out` receives student.safetensors (plain timm keys), student.json and, where the method has projectors,
    projectors.safetensors. Resumes from the last checkpoint in `work`. `policy` is the `cache:` that the features
    are expected to have; None takes theirs. Of several ranks the first publishes.
    Raises UserError: unknown method, stale store, a student without a fit tap, a killed worker.
    """
    terms_of(method)
    config = config.of_method(method)
    recipe = {k: v for k, v in asdict(config).items() if k not in OF_OTHERS}
    inputs = {"teacher": teacher_path, "features": features / "manifest.json"}
    made_by = artifacts.provenance(recipe, **inputs) | prepared.hashes() | {"method": method}
    with resume.work_folder(
        work, artifacts.digest([made_by, artifacts.code(ROOMS)]), ranks
    ) as folder:
        trainer = build(config, method, prepared, teacher_path, features, policy, ranks)
        figures = train(trainer, f"distill {method}", folder / "checkpoint.safetensors")
        if ranks.rank == 0:
            with atomic_dir(out) as finished:
                _publish(trainer, prepared, finished, made_by)
    return figures


def train(trainer: Trainer, what: str, saved: Path) -> dict[str, Any]:
    """Run the steps of a training from its last checkpoint, `saved`, on; return its figures and curves.

    `what` names it in the progress line and begins with its section of params.yaml.
    Raises UserError: a killed worker, a loss that is not finite.
    """
    timer = Stopwatch(trainer.device, every=TIMED)
    batches = trainer.feed.views.batches
    bar = progress.Progress(
        what,
        trainer.feed.steps,
        batch=trainer.config.batch,
        epoch=-(-len(batches.train) // trainer.config.batch),
        quiet=trainer.ranks.rank > 0,
    )
    with trainer.feed.watched(), closing(trainer.feed):
        curves = loop.run_steps(
            bar,
            trainer.config.checkpoint_every,
            saved,
            trainer.modules,
            trainer.optimizers,
            lambda step: train_step(trainer, step, timer),
            trainer.ranks,
        )
    return summarise(trainer, timer, curves)


def _publish(trainer: Trainer, prepared: Prepared, folder: Path, made_by: dict[str, Any]) -> None:
    config = trainer.config
    projectors = trainer.objective.projectors()
    tap = trainer.reader.tap if projectors else None
    checkpoint.save(
        folder / "student.safetensors",
        trainer.finished,
        {
            "role": "student",
            "method": trainer.method,
            "model": config.student,
            "kwargs": config.student_kwargs,
            "num_classes": len(prepared.classes),
            "classes": list(prepared.classes),
            "preprocess": trainer.reader.preprocess,
            "labels_seen": trainer.feed.labels_seen,
            "labels_total": int((prepared.labels[prepared.rows("train")] >= 0).sum()),
            "seed": config.seed,
            "tap": asdict(tap) if tap else None,
            "cakd": asdict(config.cakd) if tap else None,
            "space": trainer.space.described() if tap else None,
            "provenance": made_by,
        },
    )
    if projectors:
        save_file(projectors, folder / "projectors.safetensors")
