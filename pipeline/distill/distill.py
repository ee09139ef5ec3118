"""The loop of Algorithm 1: student and projectors every iteration, the discriminator every fifth, then only the
student is kept. Every draw is a function of (seed, step), so a killed run goes on to the same bits.
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
from pipeline.distill.methods.term import TeacherSpace
from pipeline.distill.settings import Distill
from pipeline.distill.trainer import Trainer
from pipeline.models import checkpoint
from pipeline.store.policy import Cache
from pipeline.training import loop, ranks, resume, stopwatch

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
    among: ranks.Ranks = ranks.ALONE,
) -> dict[str, Any]:
    """Train one student by one method, publish it at `out`; the figures of train/<method>.json.

    `out` receives student.safetensors (plain timm keys), student.json and, where the method has projectors,
    projectors.safetensors. Resumes from the last checkpoint in `work`. `policy` is the `cache:` that the features
    are expected to have; None takes theirs. Of several ranks the first publishes.
    Raises UserError: unknown method, stale store, a student without a fit tap, a killed worker.
    """
    terms_of(method)
    recipe = {k: v for k, v in asdict(config).items() if k not in ("methods", "workers")}
    inputs = {"teacher": teacher_path, "features": features / "manifest.json"}
    made_by = artifacts.provenance(recipe, **inputs) | prepared.made_of() | {"method": method}
    with resume.work_folder(
        work, artifacts.digest([made_by, artifacts.code(ROOMS)]), among
    ) as folder:
        trainer = Trainer(config, method, prepared, teacher_path, features, policy, among)
        watch = stopwatch.Stopwatch(trainer.place)
        steps = trainer.batches.steps
        tell = progress.Progress(
            f"distill {method}",
            steps,
            batch=config.batch,
            epoch=steps // config.epochs,
            quiet=among.rank > 0,
        )
        with trainer.feed.watched(), closing(trainer.feed):
            curves = loop.run_steps(
                tell,
                config.checkpoint_every,
                folder / "checkpoint.safetensors",
                trainer.modules,
                trainer.optimizers,
                lambda step: trainer.step(step, watch),
                among,
            )
        figures = summarise(trainer, watch, curves)
        if among.rank == 0:
            with atomic_dir(out) as finished:
                _publish(trainer, finished, made_by)
    return figures


def _publish(trainer: Trainer, folder: Path, made_by: dict[str, Any]) -> None:
    config, prepared = trainer.config, trainer.prepared
    projectors, space = trainer.objective.projectors(), TeacherSpace.of(trainer.store.manifest)
    tap = trainer.tap if projectors else None
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
            "preprocess": trainer.preprocess,
            "labels_seen": trainer.batches.labels_seen,
            "labels_total": int((prepared.labels[prepared.rows("train")] >= 0).sum()),
            "seed": config.seed,
            "tap": asdict(tap) if tap else None,
            "cakd": asdict(config.cakd) if tap else None,
            "space": space.described() if tap else None,
            "provenance": made_by,
        },
    )
    if projectors:
        save_file(projectors, folder / "projectors.safetensors")
