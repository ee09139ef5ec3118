"""Training the teacher: a timm ViT from given weights, trained or fine-tuned on every label, resumable."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

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
from timm.optim._param_groups import param_groups_layer_decay
from torch import Tensor, nn
from torch.utils.data import Dataset
from typing_extensions import Self

from pipeline.core import artifacts, progress
from pipeline.core.atomic import atomic_dir
from pipeline.core.config import STRICT, BelowOne, Seed, Share
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.augment import Augment, Augmented
from pipeline.data.prepared import Prepared
from pipeline.data.resident import resident_where_it_fits, workers_for
from pipeline.models import guide
from pipeline.models.checkpoint import create, load_weights, preprocessing, save
from pipeline.models.guide import Guide
from pipeline.models.probe import TeacherSpec, in_rows, probe_teacher
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
    clip_norm: NonNegativeFloat = 0.0  # largest norm of a step's gradient; 0: no clipping
    # learning rate of a block over that of the block behind it, for fine-tuning (Clark et al., ICLR 2020)
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 1.0
    ema: BelowOne = 0.0  # decay of the averaged weights that are published; 0: the last weights
    geometry: views.Geometry = views.Geometry()  # its training views
    augment: Augment = Augment()  # of those views only
    guide: str | None = None  # student.safetensors of a CNN that answers on the same views
    guide_weight: Share = 0.5  # of its answers; the rest is the labels'
    guide_temperature: PositiveFloat = 1.0
    guide_features: NonNegativeFloat = 0.0  # weight of its last feature map beside them
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
        dropped = self.kwargs.get("patch_drop_rate", 0)
        if self.guide is not None and self.guide_features and dropped:
            raise ValueError(
                f"got guide_features {self.guide_features} with kwargs.patch_drop_rate {dropped}; expected one of "
                "them, because a dropped token has no place on the guide's map; set the other to 0"
            )
        return self


def teach(
    config: Teach, prepared: Prepared, out: Path, work: Path, ranks: Ranks = SINGLE_PROCESS
) -> dict[str, Any]:
    """Train the ViT on every label of train and publish it at `out`; returns its description.

    Resumes from the last checkpoint in `work`. Of several ranks the first publishes.
    Raises UserError: unknown model, weights that do not fit, a token order that is not known, a grid that does not
    fit the image size, a last batch too small for batch norm, a training that diverged, a killed worker.
    """
    torch.manual_seed(config.seed)
    vit, described = _build(config, prepared)
    recipe = {k: v for k, v in asdict(config).items() if k != "workers"}
    provenance = artifacts.provenance(recipe, **weight_files(config)) | prepared.hashes()
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


def weight_files(config: Teach) -> dict[str, Path]:
    """Return the files of the initial weights and the guide, where there are any. Raises UserError: no file."""
    files = {"guide": Path(config.guide)} if config.guide is not None else {}
    if config.weights not in ("scratch", "pretrained"):
        files["weights"] = Path(config.weights)
    for name, path in files.items():
        if not path.is_file():
            others = "scratch, pretrained or " if name == "weights" else ""
            raise UserError(
                f"teach.{name}: got {path}, which is not a file; expected {others}a .safetensors file; correct "
                "the path"
            )
    return files


def _build(config: Teach, prepared: Prepared) -> tuple[nn.Module, dict[str, Any]]:
    """Create the ViT with its initial weights, and the description that rebuilds it."""
    classes = prepared.classes
    vit = create(config.model, config.kwargs, len(classes), "teach", config.weights == "pretrained")
    spec = check_fits(vit, config, prepared.image_size)
    files = weight_files(config)
    if "weights" in files:
        load_weights(vit, files["weights"])
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
    # of the part's mean loss, so that the mean over the ranks is that of the whole batch
    weight: float


class Views(Dataset[list[Batch]]):
    """This rank's part of each step's batch, a function of the step in any process; a new view in each epoch."""

    def __init__(self, config: Teach, prepared: Prepared, ranks: Ranks) -> None:
        rows = prepared.rows("train")
        self.config, self.prepared, self.ranks = config, prepared, ranks
        self.rows = rows[prepared.labels[rows] >= 0]
        self.per_epoch = -(-len(self.rows) // config.batch)
        self.steps = config.epochs * self.per_epoch
        self._order = (-1, self.rows)  # epoch, its permutation
        self._augment = Augmented(config.augment, config.seed) if config.augment.on else None

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
                views.view_batch(prepared.images, *drawn, self._augment),
                torch.from_numpy(prepared.labels[part]),
                torch.from_numpy(prepared.labels[partners]),
                None if mixed is None else torch.from_numpy(mixed.shares),
                weight,
            )
        ]


class Lesson(nn.Module):
    """The loss of a ViT on a batch: labels, and where there is a guide its answers and features."""

    def __init__(
        self, vit: Any, config: Teach, prepared: Prepared, preprocess: dict[str, Any]
    ) -> None:
        super().__init__()
        self.vit, self.config, self.preprocess = vit, config, preprocess
        self.guide = Guide(Path(config.guide), prepared) if config.guide is not None else None
        self.project: nn.Linear | None = None
        if self.guide is not None and config.guide_features:
            self.spec = probe_teacher(vit, prepared.image_size)
            self.project = nn.Linear(self.spec.width, self.guide.channels)

    def trained(self) -> list[nn.Parameter]:
        """Parameters beside those of the ViT."""
        return [] if self.project is None else [*self.project.parameters()]

    def forward(self, pixels: Tensor, batch: Batch) -> Tensor:
        """Loss of each image (B,), of views (B, 3, S, S) uint8 on the device."""
        config, device = self.config, pixels.device
        inputs, final = views.normalise(pixels, self.preprocess), None
        if self.project is None:
            logits = self.vit(inputs)
        else:
            final = self.vit.forward_features(inputs)
            logits = self.vit.forward_head(final)
        own, other = batch.labels.to(device), batch.partner_labels.to(device)
        shares = None if batch.shares is None else batch.shares.to(device)
        losses = mixed_cross_entropy(logits, own, other, shares, config.label_smoothing)
        if self.guide is None:
            return losses
        answered, feature = self.guide(pixels)
        taught = guide.answers(logits, answered, config.guide_temperature)
        losses = (1 - config.guide_weight) * losses + config.guide_weight * taught
        if self.project is not None and final is not None:
            tokens = self.project(in_rows(final, self.vit)[:, self.spec.prefix :])
            losses = losses + config.guide_features * guide.features(
                tokens, feature, self.spec.grid
            )
        return losses


def _groups(vit: Any, lesson: Lesson, config: Teach) -> list[dict[str, Any]]:
    """Optimiser groups: decay on matrices only, and with layer_decay a rate of its own for every block."""
    if config.layer_decay == 1:
        return loop.decay_groups([*vit.parameters(), *lesson.trained()], config.weight_decay)
    groups: list[dict[str, Any]] = param_groups_layer_decay(
        vit, config.weight_decay, layer_decay=config.layer_decay
    )
    return [*groups, *loop.decay_groups(lesson.trained(), config.weight_decay)]


def _check_last_batch(vit: nn.Module, batch: int, images: int, ranks: Ranks) -> None:
    """Raises UserError: the last batch of an epoch leaves a rank one image, too few for the variance of a norm."""
    last = images % batch or batch
    if last // ranks.size < 2 and any(isinstance(m, nn.BatchNorm2d) for m in vit.modules()):
        raise UserError(
            f"teach.batch: got {batch}, which leaves {last} of {images} images for the last batch; expected "
            f"{2 * ranks.size} or more there, because the teacher has batch norms; change it a little"
        )


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
    lesson = Lesson(vit, config, prepared, preprocess).to(device)
    same_start([lesson], ranks)
    optimizer = torch.optim.AdamW(_groups(vit, lesson, config), lr=config.lr)
    how = Compute(precision=config.precision, ema=config.ema)
    averaged = how.average(vit)
    trained = [*vit.parameters(), *lesson.trained()]
    prepared = resident_where_it_fits(prepared, device)
    rendered = Views(config, prepared, ranks)
    _check_last_batch(vit, config.batch, len(rendered.rows), ranks)
    steps = rendered.steps
    ahead = Ahead(rendered, steps, workers_for(prepared, config.workers), "teach")
    stream = f"teach {ranks.rank}" if ranks.rank else "teach"

    def step(number: int) -> loop.StepFigures:
        (batch,) = ahead(number)
        torch.manual_seed(seeds.step_seed(config.seed, number, stream))  # for dropout
        with how.autocast(device):
            losses = lesson(batch.views.to(device, non_blocking=True), batch)
            loss = losses.mean() * batch.weight
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        average_gradients(trained, ranks)
        if config.clip_norm:
            nn.utils.clip_grad_norm_(trained, config.clip_norm)
        for group in optimizer.param_groups:
            rate = loop.learning_rate(number, steps, config.lr)
            group["lr"] = rate * group.get("lr_scale", 1.0)
        optimizer.step()
        if averaged is not None:
            averaged.update(vit, number)
        return {"loss": loss.detach()}

    bar = progress.Progress(
        "teach", steps, batch=config.batch, epoch=rendered.per_epoch, quiet=ranks.rank > 0
    )
    checkpoint, every = folder / "checkpoint.safetensors", config.checkpoint_every
    modules: dict[str, nn.Module] = {"vit": vit}
    modules |= {} if lesson.project is None else {"project": lesson.project}
    modules |= {} if averaged is None else {"averaged": averaged}
    with ahead.watched(), closing(ahead):
        loop.run_steps(bar, every, checkpoint, modules, {"adamw": optimizer}, step, ranks)
    if averaged is not None:
        vit.load_state_dict(averaged.module.state_dict())
    vit.cpu()
