"""One student trained by one method: `build` puts it together, `train_step` is one iteration of Algorithm 1."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import UNLABELLED, Prepared
from pipeline.distill import balance, robust
from pipeline.distill.batches import Batches
from pipeline.distill.features import Features
from pipeline.distill.feed import Batch, Feed, Views
from pipeline.distill.kernels.philox import Key
from pipeline.distill.methods.table import check_stored, paired, reads
from pipeline.distill.methods.term import Sizes, StudentOutputs, TeacherSpace
from pipeline.distill.objective import Losses, Objective, Targets
from pipeline.distill.settings import Distill
from pipeline.models import checkpoint, student
from pipeline.models.student import Taps, find_tap
from pipeline.store.policy import Cache
from pipeline.store.reading import Store, as_written
from pipeline.training import compute, loop
from pipeline.training.ranks import (
    SINGLE_PROCESS,
    Ranks,
    average_figures,
    average_gradients,
    same_start,
)
from pipeline.training.seeds import step_seed
from pipeline.training.stopwatch import Stopwatch

RATIOS = 20  # points of the curves of gradient ratios


class StudentReader:
    """A student's forward pass, and the features that the method's terms read of it."""

    def __init__(
        self,
        network: nn.Module,
        preprocess: dict[str, Any],
        config: Distill,
        sizes: Sizes | None,
        stages: bool,
        device: torch.device,
    ) -> None:
        self.preprocess, self.tap = preprocess, sizes.tap if sizes else None
        self._stages = list(sizes.spec.stages) if sizes and stages else []
        self._taps = Taps(network, [*self._stages, *([self.tap.module] if self.tap else [])])
        self._forward = config.compute.compiled(network, device)
        self._memory_format = config.compute.memory_format(network, device)

    def logits(self, pixels: Tensor) -> Tensor:
        """Run the student: pixels (B, 3, S, S) 0..255 -> logits (B, K)."""
        inputs = views.normalise(pixels, self.preprocess).to(memory_format=self._memory_format)
        logits: Tensor = self._forward(inputs)
        return logits

    def outputs(
        self, logits: Tensor, labels: Tensor, key: Key, progress: float, fresh: int
    ) -> StudentOutputs:
        """Return the outputs of the last forward pass in float32, of all views but the first `fresh`."""
        taps = self._taps
        features = {module: feature[fresh:].float() for module, feature in taps.features.items()}
        return StudentOutputs(
            logits=logits[fresh:].float(),
            embedding=taps.embedding[fresh:].float(),
            feature=features[self.tap.module] if self.tap else None,
            stages=[features[module] for module in self._stages],
            labels=labels,
            key=key,
            progress=progress,
        )


@dataclass(frozen=True)
class Trainer:
    """The state of one training; `averaged` is the moving average of the student's weights, where it is on."""

    config: Distill
    method: str
    student: nn.Module
    averaged: compute.Averaged | None
    reader: StudentReader
    objective: Objective
    feed: Feed
    optimizers: dict[str, torch.optim.Optimizer]
    space: TeacherSpace
    device: torch.device
    ranks: Ranks

    @property
    def modules(self) -> dict[str, nn.Module]:
        """The modules of a checkpoint."""
        modules: dict[str, nn.Module] = {"student": self.student, "objective": self.objective}
        return modules | ({"averaged": self.averaged} if self.averaged is not None else {})

    @property
    def finished(self) -> nn.Module:
        """The student to publish: its averaged weights, where there are any."""
        return self.averaged.module if self.averaged is not None else self.student

    @property
    def backbone(self) -> list[nn.Parameter]:
        """The parameters on which the terms' gradients are compared."""
        return balance.backbone(self.student)

    def measures(self, step: int) -> bool:
        """Whether the step measures gradient norms: at RATIOS steps, and while balanced weights still change."""
        if not self.objective.loss_terms:
            return False
        measuring = self.objective.balance is not None and self.objective.balance.measuring
        return measuring or step % max(1, self.feed.steps // RATIOS) == 0

    def autocast(self) -> AbstractContextManager[Any]:
        """The autocast context of forward passes."""
        return self.config.compute.autocast(self.device)


def build(
    config: Distill,
    method: str,
    prepared: Prepared,
    teacher_path: Path,
    features: Path,
    policy: Cache | None = None,
    ranks: Ranks = SINGLE_PROCESS,
    network: nn.Module | None = None,
) -> Trainer:
    """Put together student, objective, feed and optimizers; `policy` None takes that of the features.

    `network`: a student to train further; None creates a new one. Student and objective each begin at the run's
    seed, so that neither depends on what the other draws.
    Raises UserError: an unknown or unfit student, a stale store, a method that reads what the store lacks.
    """
    device = compute.pick_device(config.compute.device, "distill.compute.device", ranks)
    torch.manual_seed(config.seed)
    network = network or checkpoint.create(
        config.student, config.student_kwargs, len(prepared.classes), "distill"
    )
    preprocess = checkpoint.preprocessing(network, prepared.image_size, prepared.crop_mode)
    prepared = as_written(features, prepared, device)
    read = reads(method, "teacher")
    store = Store(features, prepared, teacher_path, policy, features=not read <= {"logits"})
    check_stored(method, store.manifest, config.cakd.layer)
    space = TeacherSpace.of(store.manifest)
    distilled = bool(read)
    if not distilled and not config.cross_entropy.weight:
        raise UserError(
            f"distill.cross_entropy.weight: got 0 with method {method!r}, which has no other loss; expected above "
            f"0; set distill.tuned.{method}: {{cross_entropy.weight: 1.0}}"
        )
    sizes = _sizes(config, method, network, prepared, teacher_path, store) if distilled else None
    torch.manual_seed(config.seed)
    objective = Objective(method, config, sizes).to(device)
    if config.compute.compile:
        objective.compile_terms()
    network = network.to(device)
    network = network.to(memory_format=config.compute.memory_format(network, device))
    same_start((network, objective), ranks)
    batches = Batches(config, prepared, paired(method), store.views, store.geometry, store.seed)
    micro_batches = config.compute.micro_batches(config.batch, ranks)
    if distilled and batches.cached < 2 * micro_batches:
        raise UserError(
            f"distill.labelled_share: got {config.labelled_share}, which leaves {batches.cached} cached views of "
            f"a batch of {config.batch} to {micro_batches} micro-batches; expected 2 or more for each; lower it"
        )
    if objective.balance is not None and micro_batches > 1:
        raise UserError(
            f"distill.weights: got balanced with {micro_batches} micro-batches; expected one, as the weights are "
            "measured on a whole batch; set accumulate: 1 on one process, or fixed weights"
        )
    rendered = Views(batches, micro_batches, ranks)
    return Trainer(
        config=config,
        method=method,
        student=network,
        averaged=config.compute.average(network),
        reader=StudentReader(
            network, preprocess, config, sizes, "stages" in reads(method, "student"), device
        ),
        objective=objective,
        feed=Feed(
            rendered,
            Features(store, teacher_path, device, config.cakd.layer, "qkv" in read)
            if distilled
            else None,
            config.workers,
        ),
        optimizers=_optimizers(config, network, objective),
        space=space,
        device=device,
        ranks=ranks,
    )


def _sizes(
    config: Distill,
    method: str,
    network: nn.Module,
    prepared: Prepared,
    teacher_path: Path,
    store: Store,
) -> Sizes:
    """Dimensions that the terms are built for. Raises UserError: no suitable tap, no feature maps."""
    tap, spec = None, student.probe_student(network, prepared.image_size)
    grid = tuple(checkpoint.describe(teacher_path)["grid"])
    if "stages" in reads(method, "student"):
        student.check_feature_maps(network, spec)
    if "tap" in reads(method, "student"):
        tap = find_tap(network, prepared.image_size, grid, config.cakd.tap)
    train = prepared.rows("train")
    labels = np.where(prepared.student_label, prepared.labels, UNLABELLED)[train]
    return Sizes(
        classes=len(prepared.classes),
        spec=spec,
        tap=tap,
        grid=grid,
        space=TeacherSpace.of(store.manifest),
        labels=torch.from_numpy(labels),
        views=store.views,
    )


def _optimizers(
    config: Distill, network: nn.Module, objective: Objective
) -> dict[str, torch.optim.Optimizer]:
    groups = loop.decay_groups([*network.parameters(), *objective.trained()], config.weight_decay)
    optimizer: torch.optim.Optimizer
    if config.optimizer == "sgd":
        nesterov = config.momentum > 0
        optimizer = torch.optim.SGD(
            groups, config.lr, config.momentum, nesterov=nesterov, fused=True
        )
    else:
        optimizer = torch.optim.AdamW(groups, config.lr, fused=True)
    optimizers: dict[str, torch.optim.Optimizer] = {"student": optimizer}
    if objective.discriminator is not None:
        optimizers["discriminator"] = torch.optim.Adam(
            objective.discriminator.parameters(),
            lr=config.cakd.discriminator_lr,
            betas=(0.5, 0.999),
            fused=True,
        )
    return optimizers


def train_step(trainer: Trainer, step: int, timer: Stopwatch) -> dict[str, Tensor | float]:
    """One iteration of Algorithm 1; this rank's unweighted losses, not read from the device."""
    losses, real, fake = student_step(trainer, step, timer)
    due = step % trainer.config.cakd.discriminator_every == 0
    if due and fake is not None and real is not None:
        with timer.stage("adversarial"):
            losses |= discriminator_step(trainer, real, fake)
    timer.next_step()
    return losses


def student_step(
    trainer: Trainer, step: int, timer: Stopwatch
) -> tuple[dict[str, Tensor | float], Tensor | None, Tensor | None]:
    """Update student and projectors; return mean losses of this rank, and h_T and h'_S (B, N, D)."""
    config, optimizer, objective = trainer.config, trainer.optimizers["student"], trainer.objective
    # Modules with random numbers of their own (dropout in the student) draw from this step's seed.
    rank = f" {trainer.ranks.rank}" if trainer.ranks.rank else ""
    torch.manual_seed(step_seed(config.seed, step, f"student{rank}"))
    progress = step / trainer.feed.steps
    weights = objective.weights(progress)
    optimizer.zero_grad(set_to_none=True)
    config.compute.begin_step()
    sums: dict[str, Tensor | float] = {}
    ratios: dict[str, float] = {}
    real: list[Tensor] = []
    fake: list[Tensor] = []
    for number, batch in enumerate(trainer.feed.batches(step, timer)):
        losses = _losses(trainer, step, batch, timer)
        if number == 0 and trainer.measures(step):
            with timer.stage("ratios"):
                reaching = {n: v for n, v in losses.terms.items() if n not in objective.beside}
                norms = balance.gradient_norms(reaching, trainer.backbone)
            norms = average_figures(norms, trainer.ranks)
            if objective.balance is not None and objective.balance.measuring:
                objective.balance.add(norms)
                weights = objective.weights(progress)
            ratios = balance.ratios(norms, weights)
        for name, loss in losses.terms.items():
            sums[name] = sums.get(name, 0.0) + loss.detach() / config.compute.accumulate
        total = torch.stack([weights[name] * loss for name, loss in losses.terms.items()]).sum()
        with timer.stage("backward"):
            (total / config.compute.accumulate).backward()
        if losses.fake is not None and losses.real is not None:
            fake.append(losses.fake)
            real.append(losses.real)
    with timer.stage("optimizer"):
        student, beside = list(trainer.student.parameters()), objective.trained()
        average_gradients([*student, *beside], trainer.ranks)
        if config.clip_norm:
            # Each by itself: the student's step does not depend on what is dropped after training.
            for parameters in (student, beside):
                nn.utils.clip_grad_norm_(parameters, config.clip_norm)
        for group in optimizer.param_groups:
            group["lr"] = loop.learning_rate(step, trainer.feed.steps, config.lr)
        optimizer.step()
        if trainer.averaged is not None:
            trainer.averaged.update(trainer.student, step)
    return sums | ratios, torch.cat(real) if real else None, torch.cat(fake) if fake else None


def _losses(trainer: Trainer, step: int, batch: Batch, timer: Stopwatch) -> Losses:
    """The losses of one micro-batch, with their graph."""
    device, indices, reader = trainer.device, batch.indices, trainer.reader
    own = batch.views.to(device, non_blocking=True)
    pixels = own.float()
    if "trans" in trainer.objective.terms:
        with timer.stage("view"):
            seed = trainer.config.seed
            images = zip(indices.rows, indices.view_numbers, strict=True)
            seeds = [step_seed(seed, step, f"trans {row} {view}") for row, view in images]
            pixels = trainer.config.cakd.trans(own, seeds)
    with timer.stage("student"), trainer.autocast():
        logits = reader.logits(pixels)
    outputs = None
    if batch.teacher is not None:
        cached = indices.cached
        key = Key(trainer.config.seed, torch.from_numpy(cached.records), step).on(device)
        shown = np.where(cached.shares >= 0.5, cached.labels, cached.partner_labels)
        labels = torch.from_numpy(shown).to(device)
        outputs = reader.outputs(logits, labels, key, step / trainer.feed.steps, indices.fresh)
    targets = Targets(
        torch.from_numpy(indices.labels).to(device),
        torch.from_numpy(indices.partner_labels).to(device),
        torch.from_numpy(indices.shares).to(device) if indices.mixed else None,
        batch.labelled,
    )
    losses: Losses = trainer.objective(
        logits, targets, outputs, batch.teacher, timer, trainer.autocast
    )
    return losses.of_part(batch.share)


def discriminator_step(trainer: Trainer, real: Tensor, fake: Tensor) -> dict[str, Tensor]:
    """Eq. 8 on detached fakes, after the student's backward (decision 11); loss and accuracy."""
    assert trainer.objective.discriminator is not None
    loss, accuracy = robust.discriminator(trainer.objective.discriminator, real, fake)
    share = len(real) * trainer.ranks.size / trainer.feed.views.batches.cached
    loss, accuracy = share * loss, share * accuracy  # as Losses.of_part
    optimizer = trainer.optimizers["discriminator"]
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    average_gradients(trainer.objective.discriminator.parameters(), trainer.ranks)
    optimizer.step()
    return {"discriminator": loss.detach(), "discriminator_accuracy": accuracy}
