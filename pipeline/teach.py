"""Training the teacher: a timm ViT from given weights, trained or fine-tuned on every label, resumable."""

from __future__ import annotations

import dataclasses
from contextlib import closing
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
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import Self

from pipeline.core import artifacts, progress
from pipeline.core.atomic import atomic_dir
from pipeline.core.config import STRICT, Seed, Share
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.models.checkpoint import create, load_weights, preprocessing, save
from pipeline.models.probe import TeacherSpec, probe_teacher
from pipeline.training import compute, loop, resume, seeds
from pipeline.training.ahead import Ahead
from pipeline.training.compute import Compute, Device
from pipeline.training.mixed_loss import mixed_cross_entropy
from pipeline.training.ranks import SINGLE_PROCESS, Ranks, average_gradients, same_start

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
    workers: NonNegativeInt = 0  # processes that make its views; 0: this one makes them
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


def teach(
    config: Teach, prepared: Prepared, out: Path, work: Path, ranks: Ranks = SINGLE_PROCESS
) -> dict[str, Any]:
    """Train the ViT on every label of train and publish it at `out`; returns its description.

    Resumes from the last checkpoint in `work`. Of several ranks the first publishes.
    Raises UserError: unknown model, weights that do not fit, a token order that is not known, a grid that does not
    fit the image size, a training that diverged, a killed worker.
    """
    torch.manual_seed(config.seed)
    vit, described = _build(config, prepared)
    recipe = {k: v for k, v in asdict(config).items() if k != "workers"}
    provenance = artifacts.provenance(recipe, **_weight_files(config)) | prepared.hashes()
    with resume.work_folder(
        work, artifacts.digest([provenance, artifacts.code(ROOMS)]), ranks
    ) as folder:
        if config.epochs:
            _train(vit, config, prepared, described["preprocess"], folder, ranks)
        if ranks.rank == 0:
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


@dataclasses.dataclass(frozen=True)
class Batch:
    """A rank's part of a step's batch."""

    views: Tensor  # (B, 3, S, S) uint8
    labels: Tensor  # (B,)
    partner_labels: Tensor  # of the image it is mixed with
    shares: Tensor | None  # of the own label; None where no view is mixed
    weight: (
        float  # of the part's mean loss, so that the mean over the ranks is that of the whole batch
    )


class Views(Dataset[list[Batch]]):
    """This rank's part of each step's batch, a function of the step in any process; a new view in each epoch."""

    def __init__(self, config: Teach, prepared: Prepared, ranks: Ranks) -> None:
        rows = prepared.rows("train")
        self.config, self.prepared, self.ranks = config, prepared, ranks
        self.rows = rows[prepared.labels[rows] >= 0]
        self.per_epoch = -(-len(self.rows) // config.batch)
        self.steps = config.epochs * self.per_epoch
        self._order = (-1, self.rows)  # epoch, its permutation

    def __getitem__(self, step: int) -> list[Batch]:
        config, prepared, size = self.config, self.prepared, self.ranks.size
        epoch, position = divmod(step, self.per_epoch)
        if self._order[0] != epoch:
            self._order = epoch, seeds.permutation(len(self.rows), config.seed, "teach", epoch)
        whole = self.rows[self._order[1][position * config.batch : (position + 1) * config.batch]]
        part = whole[self.ranks.rank :: size]
        weight = len(part) * size / len(whole)
        if not len(part):  # of the last batch of an epoch: an image that counts nothing
            part = whole[:1]
        # Negative view numbers: the feature cache counts from 0, so the teacher never labels a view it was trained
        # on, even with the same seed and geometry.
        drawn = (config.geometry, config.seed, part, np.full(len(part), -1 - epoch), self.rows)
        mixed = views.mixed_with(*drawn, prepared.image_size)
        partners = part if mixed is None else mixed.partners
        return [
            Batch(
                views.view_batch(prepared.images, *drawn),
                torch.from_numpy(prepared.labels[part]),
                torch.from_numpy(prepared.labels[partners]),
                None if mixed is None else torch.from_numpy(mixed.shares),
                weight,
            )
        ]


def _train(
    vit: nn.Module,
    config: Teach,
    prepared: Prepared,
    preprocess: dict[str, Any],
    folder: Path,
    ranks: Ranks,
) -> None:
    """Train in place with AdamW, one view of every labelled image per epoch."""
    device = compute.pick_device(config.device, "teach.device", ranks)
    vit.to(device)
    same_start([vit], ranks)
    optimizer = torch.optim.AdamW(
        loop.decay_groups(vit.parameters(), config.weight_decay), lr=config.lr
    )
    rendered = Views(config, prepared, ranks)
    steps = rendered.steps
    ahead = Ahead(rendered, steps, config.workers, "teach")
    stream = f"teach {ranks.rank}" if ranks.rank else "teach"

    def step(number: int) -> loop.StepFigures:
        (batch,) = ahead(number)
        torch.manual_seed(seeds.step_seed(config.seed, number, stream))  # for dropout
        own, other = batch.labels.to(device), batch.partner_labels.to(device)
        shares = None if batch.shares is None else batch.shares.to(device)
        with Compute(precision=config.precision).autocast(device):
            logits = vit(views.normalise(batch.views.to(device), preprocess))
            losses = mixed_cross_entropy(logits, own, other, shares, config.label_smoothing)
            loss = losses.mean() * batch.weight
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(vit.parameters(), ranks)
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(number, steps, config.lr)
        optimizer.step()
        return {"loss": loss.detach()}

    bar = progress.Progress(
        "teach", steps, batch=config.batch, epoch=rendered.per_epoch, quiet=ranks.rank > 0
    )
    checkpoint, every = folder / "checkpoint.safetensors", config.checkpoint_every
    modules, optimizers = {"vit": vit}, {"adamw": optimizer}
    with ahead.watched(), closing(ahead):
        loop.run_steps(bar, every, checkpoint, modules, optimizers, step, ranks)
    vit.cpu()
