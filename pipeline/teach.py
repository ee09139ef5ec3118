"""Training the teacher: a timm ViT from given weights, trained or fine-tuned on every label, resumable."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import (
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    model_validator,
)
from pydantic.dataclasses import dataclass
from torch import nn
from typing_extensions import Self

from pipeline.core import artifacts, progress
from pipeline.core.atomic import atomic_dir
from pipeline.core.config import STRICT, Seed, Share
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.models.checkpoint import create, load_weights, preprocessing, save
from pipeline.models.probe import TeacherSpec, probe_teacher
from pipeline.training import compute, loop, ranks, resume, seeds
from pipeline.training.compute import Compute, Device
from pipeline.training.mixed_loss import mixed_cross_entropy

# Rooms of pipeline/ whose code trains a teacher: after an edit there an unfinished training starts again.
ROOMS = ("core", "data", "models", "teach.py", "training")


@dataclass(frozen=True, config=STRICT)
class Teach:
    """`teach:` which ViT, from which weights, trained how."""

    model: str
    weights: str = "scratch"  # scratch | pretrained | a path to safetensors
    kwargs: dict[str, Any] = Field(default_factory=dict)  # timm's: img_size, patch_size, depth, ...
    epochs: NonNegativeInt = 30  # 0 uses the weights as they are
    batch: PositiveInt = 64
    lr: PositiveFloat = 2e-3  # peak; linear warm-up over 5 % of the steps, then cosine to 0
    weight_decay: NonNegativeFloat = 0.05
    label_smoothing: Share = 0.0
    geometry: views.Geometry = views.Geometry()  # its training views
    seed: Seed = 0
    checkpoint_every: PositiveInt = 200  # steps
    device: Device = "auto"
    precision: Literal["fp32", "bf16"] = "fp32"  # bf16: autocast

    @model_validator(mode="after")
    def _check_trained(self) -> Self:
        if self.weights == "scratch" and self.epochs == 0:
            raise ValueError(
                f"got epochs {self.epochs} with weights 'scratch'; expected 1 epoch or more, or trained weights"
            )
        return self


def teach(config: Teach, prepared: Prepared, out: Path, work: Path) -> dict[str, Any]:
    """Train the ViT on every label of train and publish it at `out`; returns its description.

    Resumes from the last checkpoint in `work`.
    Raises UserError: unknown model, weights that do not fit, a token order that is not known, a grid that does not
    fit the image size, a training that diverged.
    """
    torch.manual_seed(config.seed)
    vit, described = _build(config, prepared)
    provenance = artifacts.provenance(asdict(config), **_weight_files(config)) | prepared.hashes()
    with resume.work_folder(work, artifacts.digest([provenance, artifacts.code(ROOMS)])) as folder:
        if config.epochs:
            _train(vit, config, prepared, described["preprocess"], folder)
        with atomic_dir(out) as finished:
            path = finished / "teacher.safetensors"
            save(path, vit.eval(), described | {"provenance": provenance})
    return described


def _weight_files(config: Teach) -> dict[str, Path]:
    """Return the file of the initial weights, where there is one."""
    if config.weights in ("scratch", "pretrained"):
        return {}
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(
            f"teach.weights: got {path}, which is not a file; expected scratch, pretrained or a .safetensors "
            "file; correct the path"
        )
    return {"weights": path}


def _build(config: Teach, prepared: Prepared) -> tuple[nn.Module, dict[str, Any]]:
    """Create the ViT with its initial weights, and the description that rebuilds it."""
    classes = prepared.classes
    vit = create(config.model, config.kwargs, len(classes), "teach", config.weights == "pretrained")
    spec = check_fits(vit, config, prepared.image_size)
    for path in _weight_files(config).values():
        load_weights(vit, path)
    return vit, {
        "role": "teacher",
        "model": config.model,
        "kwargs": config.kwargs,
        "num_classes": len(classes),
        "classes": list(classes),
        "preprocess": preprocessing(vit, prepared.image_size, prepared.crop_mode),
        "grid": spec.grid,
        "labels_seen": int((prepared.labels[prepared.rows("train")] >= 0).sum()),
        "seed": config.seed,
    }


def check_fits(vit: Any, config: Teach, image_size: int) -> TeacherSpec:
    """Check that a ViT fits the images, and describe it.

    Raises UserError: another image size, patches that do not divide it, a token order that is not known.
    """
    embedding = getattr(vit, "patch_embed", None)
    # Before the probe, whose own error on an image of the wrong size would be timm's. A pyramid takes any size.
    if getattr(embedding, "img_size", None) is not None:
        _check_size(embedding, config, image_size)
    return probe_teacher(vit, image_size)


def _check_size(embedding: Any, config: Teach, image_size: int) -> None:
    expected = tuple(embedding.img_size)
    if expected != (image_size,) * 2:
        raise UserError(
            f"teach.model: got {config.model} for images of {expected[0]}x{expected[1]} px; expected "
            f"{image_size}x{image_size} px, as prepared; "
            "set teach.kwargs.img_size or prepare.image_size"
        )
    patch = tuple(embedding.patch_size)
    if image_size % patch[0] or image_size % patch[1]:
        below = image_size - image_size % patch[0]
        raise UserError(
            f"teach.kwargs.patch_size: got {patch[0]}, which does not divide {image_size} px; expected one of "
            f"{', '.join(str(p) for p in range(2, image_size // 2 + 1) if image_size % p == 0)}; "
            f"or set prepare.image_size and teach.kwargs.img_size to {below} or {below + patch[0]}"
        )


def _train(
    vit: nn.Module,
    config: Teach,
    prepared: Prepared,
    preprocess: dict[str, Any],
    folder: Path,
) -> None:
    """Train in place with AdamW, one view of every labelled image per epoch."""
    rows = prepared.rows("train")
    rows = rows[prepared.labels[rows] >= 0]
    per_epoch = -(-len(rows) // config.batch)
    steps = config.epochs * per_epoch
    precision = Compute(precision=config.precision)
    device = compute.pick_device(config.device, "teach.device", ranks.SINGLE_PROCESS)
    vit.to(device)
    optimizer = torch.optim.AdamW(
        loop.decay_groups(vit.parameters(), config.weight_decay), lr=config.lr
    )

    def step(number: int) -> loop.StepFigures:
        epoch, position = divmod(number, per_epoch)
        order = seeds.permutation(len(rows), config.seed, "teach", epoch)
        selected = rows[order[position * config.batch : (position + 1) * config.batch]]
        # Negative view numbers: the feature cache counts from 0, so the teacher never labels a view it was trained
        # on, even with the same seed and geometry.
        numbers = np.full(len(selected), -1 - epoch)
        drawn = (config.geometry, config.seed, selected, numbers, rows)
        batch = views.view_batch(prepared.images, *drawn)
        torch.manual_seed(seeds.step_seed(config.seed, number, "teach"))  # for dropout
        mixed = views.mixed_with(*drawn, prepared.image_size)
        partners = selected if mixed is None else mixed.partners
        own, other = (torch.from_numpy(prepared.labels[r]).to(device) for r in (selected, partners))
        shares = None if mixed is None else torch.from_numpy(mixed.shares).to(device)
        with precision.autocast(device):
            logits = vit(views.normalise(batch.to(device), preprocess))
            losses = mixed_cross_entropy(logits, own, other, shares, config.label_smoothing)
            loss = losses.mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(number, steps, config.lr)
        optimizer.step()
        return {"loss": loss.detach()}

    checkpoint = folder / "checkpoint.safetensors"
    every = config.checkpoint_every
    bar = progress.Progress("teach", steps, batch=config.batch, epoch=steps // config.epochs)
    loop.run_steps(bar, every, checkpoint, {"vit": vit}, {"adamw": optimizer}, step)
    vit.cpu()
