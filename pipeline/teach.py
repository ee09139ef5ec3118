"""Making the teacher: a timm ViT from its weights, trained or fine-tuned on every label; killed, it goes on."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
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
from torch.nn import functional as F
from typing_extensions import Self

from pipeline.core import artifacts, progress
from pipeline.core.atomic import atomic_dir
from pipeline.core.config import STRICT, Seed, Share
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.mixing import Mixture
from pipeline.data.prepared import Prepared
from pipeline.models.checkpoint import create, load_weights, preprocessing, save
from pipeline.models.probe import TeacherSpec, probe_teacher
from pipeline.training import compute, loop, ranks, resume, seeds
from pipeline.training.compute import Compute, Device

# Rooms of pipeline/ whose code makes a teacher: an edit there starts an unfinished training anew.
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
    """Build the ViT, train it on every label of train, publish it at `out`; its description.

    Resumes from the last checkpoint in `work`.
    Raises UserError: unknown model, no replayable last block, a grid that does not fit the image size, a
    training that diverged.
    """
    torch.manual_seed(config.seed)
    vit, described = _build(config, prepared)
    made_by = artifacts.provenance(asdict(config), **_given(config)) | prepared.made_of()
    with resume.work_folder(work, artifacts.digest([made_by, artifacts.code(ROOMS)])) as folder:
        if config.epochs:
            _train(vit, config, prepared, described["preprocess"], folder)
        with atomic_dir(out) as finished:
            path = finished / "teacher.safetensors"
            save(path, vit.eval(), described | {"provenance": made_by})
    return described


def _given(config: Teach) -> dict[str, Path]:
    """The file the weights come from, where there is one."""
    if config.weights in ("scratch", "pretrained"):
        return {}
    path = Path(config.weights)
    if not path.is_file():
        raise UserError(
            f"teach.weights: {path} is no file; allowed: scratch, pretrained, or a .safetensors file"
        )
    return {"weights": path}


def _build(config: Teach, prepared: Prepared) -> tuple[nn.Module, dict[str, Any]]:
    """The ViT with its first weights, and the description that rebuilds it."""
    classes = prepared.classes
    vit = create(config.model, config.kwargs, len(classes), "teach", config.weights == "pretrained")
    found = check_fits(vit, config, prepared.image_size)
    for path in _given(config).values():
        load_weights(vit, path)
    return vit, {
        "role": "teacher",
        "model": config.model,
        "kwargs": config.kwargs,
        "num_classes": len(classes),
        "classes": list(classes),
        "preprocess": preprocessing(vit, prepared.image_size),
        "grid": found.grid,
        "labels_seen": int((prepared.labels[prepared.rows("train")] >= 0).sum()),
        "seed": config.seed,
    }


def check_fits(vit: Any, config: Teach, image_size: int) -> TeacherSpec:
    """What its last block computes.

    Raises UserError: not fit to teach by its tokens, or it takes images of another size.
    """
    embedding = getattr(vit, "patch_embed", None)
    if getattr(embedding, "img_size", None) is not None:  # a pyramid may be built for any size
        _check_size(embedding, config, image_size)  # first: `probe_teacher` shows the ViT an image
    return probe_teacher(vit, image_size)


def _check_size(embedding: Any, config: Teach, image_size: int) -> None:
    expected = tuple(embedding.img_size)
    if expected != (image_size,) * 2:
        raise UserError(
            f"teach.model: {config.model} takes {expected[0]}x{expected[1]} px, the prepared images are "
            f"{image_size}x{image_size} px; "
            "set teach.kwargs.img_size or prepare.image_size"
        )
    patch = tuple(embedding.patch_size)
    if image_size % patch[0] or image_size % patch[1]:
        below = image_size - image_size % patch[0]
        raise UserError(
            f"teach.kwargs.patch_size: got {patch[0]}, which does not divide {image_size} px into whole patches; "
            f"allowed: {', '.join(str(p) for p in range(2, image_size // 2 + 1) if image_size % p == 0)}; "
            f"or set prepare.image_size and teach.kwargs.img_size to {below} or {below + patch[0]}"
        )


def _train(
    vit: nn.Module,
    config: Teach,
    prepared: Prepared,
    preprocess: dict[str, Any],
    folder: Path,
) -> None:
    """AdamW. The view in epoch e is number -1 - e: what the cache numbers from 0 is never what the teacher

    learned by heart, even at one seed and geometry.
    """
    rows = prepared.rows("train")
    rows = rows[prepared.labels[rows] >= 0]
    per_epoch = -(-len(rows) // config.batch)
    steps = config.epochs * per_epoch
    how = Compute(precision=config.precision)
    place = compute.pick_device(config.device, "teach.device", ranks.SINGLE_PROCESS)
    vit.to(place)
    optimizer = torch.optim.AdamW(
        loop.decay_groups(vit.parameters(), config.weight_decay), lr=config.lr
    )

    def step(number: int) -> resume.StepFigures:
        epoch, position = divmod(number, per_epoch)
        order = seeds.permutation(len(rows), config.seed, "teach", epoch)
        chosen = rows[order[position * config.batch : (position + 1) * config.batch]]
        numbers = np.full(len(chosen), -1 - epoch)
        of = (config.geometry, config.seed, chosen, numbers, rows)
        batch = views.view_batch(prepared.images, *of)
        torch.manual_seed(seeds.step_seed(config.seed, number, "teach"))  # for drop-out
        mixed = views.mixed_with(*of, prepared.image_size)
        with how.autocast(place):
            logits = vit(views.normalise(batch.to(place), preprocess))
            loss = _loss(logits, prepared.labels, chosen, mixed, config.label_smoothing)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(number, steps, config.lr)
        optimizer.step()
        return {"loss": loss.item()}

    checkpoint = folder / "checkpoint.safetensors"
    every = config.checkpoint_every
    bar = progress.Progress("teach", steps, batch=config.batch, epoch=steps // config.epochs)
    loop.run_steps(bar, every, checkpoint, {"vit": vit}, {"adamw": optimizer}, step)
    vit.cpu()


def _loss(
    logits: Tensor,
    labels: NDArray[np.int64],
    rows: NDArray[np.int64],
    mixed: Mixture | None,
    smoothing: float,
) -> Tensor:
    """Mean cross-entropy of logits (B, K) with the labels of these rows, mixed where the views are."""

    def of(rows: NDArray[np.int64]) -> Tensor:
        target = torch.from_numpy(labels[rows]).to(logits.device)
        return F.cross_entropy(logits, target, reduction="none", label_smoothing=smoothing)

    if mixed is None:
        return of(rows).mean()
    shares = torch.from_numpy(mixed.shares).to(logits.device)
    return (shares * of(rows) + (1 - shares) * of(mixed.partners)).mean()
