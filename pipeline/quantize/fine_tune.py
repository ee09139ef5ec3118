"""Quantization-aware distillation: a distilled student trained further while its int8 is simulated.

Losses, feature cache and batches are those of its distillation; the loop, its resumption and its figures too.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from pipeline.core import artifacts
from pipeline.core.atomic import atomic_dir
from pipeline.data.prepared import Prepared, normalised, spread
from pipeline.distill.distill import train
from pipeline.distill.objective import PROJECTORS, Objective
from pipeline.distill.settings import Distill
from pipeline.distill.trainer import build
from pipeline.models import checkpoint, ranges
from pipeline.quantize import folding
from pipeline.quantize.settings import Quantize
from pipeline.quantize.simulation import Simulation
from pipeline.store.policy import Cache
from pipeline.training import resume

# Rooms of pipeline/ whose code makes a student: an edit there starts an unfinished training anew.
ROOMS = ("core", "data", "distill", "models", "quantize", "store", "training")
IMAGES = 256  # of val, that the SQNR of the published student is measured on


@dataclass(frozen=True)
class Student:
    """A distilled student: as timm creates it, and folded, which computes the same; both in eval mode."""

    path: Path
    description: dict[str, Any]
    plain: nn.Module
    folded: nn.Module
    norms: folding.Norms

    @classmethod
    def load(cls, path: Path) -> Student:
        """Load and fold a checkpoint; `plain` gets the folded weights. Raises UserError: it cannot be folded."""
        plain, description = checkpoint.load(path)
        folded = folding.merge_branches(copy.deepcopy(plain))
        norms = folding.fold(folded, description["preprocess"]["image_size"])
        return cls(path, description, folding.unfold(folded, plain, norms), folded, norms)


def recipe(config: Distill, method: str, settings: Quantize) -> Distill:
    """The settings of the fine-tuning: those of the method, with its own steps and learning rate.

    In float32 and without torch.compile, as the simulation needs it; the last weights are published.
    """
    own = config.of_method(method)
    compute = replace(own.compute, precision="fp32", compile=False, ema=0.0)
    return replace(own, steps=settings.steps, epochs=None, lr=settings.lr, compute=compute)


def fine_tune(
    config: Distill,
    settings: Quantize,
    student: Student,
    simulation: Simulation,
    prepared: Prepared,
    teacher_path: Path,
    features: Path,
    out: Path,
    work: Path,
    policy: Cache | None = None,
) -> dict[str, Any]:
    """Fine-tune a student under its simulation, publish it at `out`, return the figures of its training.

    `out` receives student.safetensors (plain timm keys, batch norms that only add), student.json and
    student-ranges.json. Resumes from the last checkpoint in `work`; `policy` as in `distill`.
    Raises UserError: a stale store, a killed worker.
    """
    method = student.description["method"]
    config = recipe(config, method, settings)
    made_of = {k: v for k, v in asdict(config).items() if k not in ("methods", "tuned", "workers")}
    made_of["quantize"] = asdict(settings)
    inputs = {
        "student": student.path,
        "teacher": teacher_path,
        "features": features / "manifest.json",
    }
    made_by = artifacts.provenance(made_of, **inputs) | prepared.hashes() | {"method": method}
    started = [made_by, simulation.ranges(), artifacts.code(ROOMS)]
    simulation.attach(student.folded)
    with resume.work_folder(work, artifacts.digest(started)) as folder:
        trainer = build(
            config, method, prepared, teacher_path, features, policy, network=student.folded
        )
        load_projectors(trainer.objective, student.path.with_name("projectors.safetensors"))
        figures = train(trainer, f"quantize {method}", folder / "checkpoint.safetensors")
        with atomic_dir(out) as finished:
            publish(student, simulation, prepared, finished / "student.safetensors", made_by)
    return figures


def load_projectors(objective: Objective, path: Path) -> None:
    """Go on with the projectors of the distillation, where it published some; other trained terms begin anew."""
    if objective.projectors() is None or not path.is_file():
        return
    terms = dict(objective.loss_terms.items())
    both = nn.ModuleDict({name: terms[name].project for name in PROJECTORS})  # type: ignore[misc]
    both.load_state_dict(load_file(path))


def publish(
    student: Student,
    simulation: Simulation,
    prepared: Prepared,
    path: Path,
    made_by: dict[str, Any],
) -> None:
    """Write the fine-tuned student as plain timm, and its ranges beside it."""
    plain = folding.unfold(student.folded.cpu(), student.plain, student.norms)
    preprocess = student.description["preprocess"]
    rows = spread(prepared.rows("val"), IMAGES)
    x = torch.from_numpy(normalised(prepared.images.squares(rows), preprocess))
    decibel = sqnr_db(_logits(plain, x), _logits(student.folded, x))
    checkpoint.save(path, plain, {**student.description, "provenance": made_by})
    weights = {"weights_sha256": artifacts.sha256(path)}
    document = {"schema": ranges.SCHEMA, **weights, "sqnr_db": decibel, **simulation.ranges()}
    artifacts.write_json(path.with_name(f"{path.stem}{ranges.SUFFIX}"), document)


def sqnr_db(reference: Tensor, other: Tensor) -> float:
    """SQNR of logits (N, K), their mean over the images taken from the signal, dB; 200 where they are equal."""
    signal = (reference - reference.mean(dim=0)).double().square().sum()
    noise = (reference - other).double().square().sum()
    return float(10 * torch.log10(signal / noise)) if noise and signal else 200.0


@torch.no_grad()
def _logits(network: nn.Module, x: Tensor) -> Tensor:
    return torch.cat([network(part) for part in x.split(64)])
