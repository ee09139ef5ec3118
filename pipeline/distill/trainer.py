"""One student trained by one method: its construction and its step."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.distill import robust
from pipeline.distill.batches import Batch, Batches
from pipeline.distill.features import Features
from pipeline.distill.feed import Feed
from pipeline.distill.kernels.philox import Key
from pipeline.distill.methods.table import reads, refuse_unread, settings
from pipeline.distill.methods.term import Seen, Sizes, TeacherSpace
from pipeline.distill.objective import Found, Objective
from pipeline.distill.settings import Distill
from pipeline.models import checkpoint, student
from pipeline.models.student import Taps, find_tap
from pipeline.store.policy import Cache
from pipeline.store.reading import Store
from pipeline.training import compute, loop, ranks, stopwatch
from pipeline.training.seeds import step_seed


class Trainer:
    """One student, one method: everything a step needs, and the step."""

    def __init__(
        self,
        config: Distill,
        method: str,
        prepared: Prepared,
        teacher_path: Path,
        features: Path,
        policy: Cache | None = None,
        among: ranks.Ranks = ranks.ALONE,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.method, self.prepared, self.among = config, method, prepared, among
        self.place = compute.place(config.compute.device, "distill.compute.device", among)
        self.student = checkpoint.create(
            config.student, config.student_kwargs, len(prepared.classes), "distill"
        )
        self.preprocess = checkpoint.preprocessing(self.student, prepared.image_size)
        self.store = opened = Store(features, prepared, teacher_path, policy)
        refuse_unread(method, opened.manifest)
        taught = bool(reads(method, "teacher"))
        self.features = Features(opened, teacher_path, self.place) if taught else None
        self.batches = Batches(config, prepared, taught, opened.views)
        parts = config.compute.parts(config.batch, among)
        self.feed = Feed(self.batches, opened.geometry, opened.seed, config.workers, parts, among)
        sizes = self._sizes(teacher_path) if taught else None
        torch.manual_seed(config.seed)  # again: loading a teacher may or may not have drawn numbers
        self.objective = Objective(
            method, settings(config.logits, config.cakd, config.terms), sizes
        ).to(self.place)
        self.tap = sizes.tap if sizes else None
        layout = torch.channels_last if config.compute.channels_last else torch.preserve_format
        self.student = self.student.to(self.place).to(memory_format=layout)
        ranks.same_start((self.student, self.objective), among)
        self._stages = (
            sizes.anatomy.stages if sizes and "stages" in reads(method, "student") else []
        )
        self._taps = Taps(self.student, [*self._stages, *([self.tap.module] if self.tap else [])])
        self._forward = torch.compile(self.student) if config.compute.compile else self.student
        self.averaged = config.compute.average(self.student)
        self.optimizers = self._make_optimizers()

    def _sizes(self, teacher_path: Path) -> Sizes:
        """What the terms are built for. Raises UserError: no fit tap, nothing to read the student by."""
        config, prepared = self.config, self.prepared
        tap, found = None, student.anatomy(self.student, prepared.image_size)
        if "stages" in reads(self.method, "student"):
            student.refuse_without_maps(self.student, found)
        if "tap" in reads(self.method, "student"):
            grid = tuple(checkpoint.describe(teacher_path)["grid"])
            tap = find_tap(self.student, prepared.image_size, grid, config.cakd.tap)
        return Sizes(
            classes=len(prepared.classes),
            anatomy=found,
            tap=tap,
            space=TeacherSpace.of(self.store.manifest),
            images=len(prepared.rows("train")),
            views=self.store.views,
        )

    def _make_optimizers(self) -> dict[str, torch.optim.Optimizer]:
        config = self.config
        trained = [*self.student.parameters(), *self.objective.trained()]
        made: dict[str, torch.optim.Optimizer] = {
            "student": torch.optim.AdamW(trained, lr=config.lr, weight_decay=config.weight_decay)
        }
        if self.objective.discriminator is not None:
            made["discriminator"] = torch.optim.Adam(
                self.objective.discriminator.parameters(),
                lr=config.cakd.discriminator_lr,
                betas=(0.5, 0.999),
            )
        return made

    @property
    def modules(self) -> dict[str, nn.Module]:
        """What a checkpoint holds."""
        found: dict[str, nn.Module] = {"student": self.student, "objective": self.objective}
        return found | ({"averaged": self.averaged} if self.averaged is not None else {})

    @property
    def finished(self) -> nn.Module:
        """The student that is published: its averaged weights, where there are any."""
        return self.averaged.module if self.averaged is not None else self.student

    def step(self, step: int, watch: stopwatch.Stopwatch) -> dict[str, float]:
        """One iteration of Algorithm 1; the unweighted losses."""
        seen, real, fake = self._student_step(step, watch)
        due = step % self.config.cakd.discriminator_every == 0
        if due and fake is not None and real is not None:
            with watch.stage("adversarial"):
                seen |= self._discriminator_step(real, fake)
        watch.next_step()
        return ranks.average_figures(seen, self.place, self.among)

    def _student_step(
        self, step: int, watch: stopwatch.Stopwatch
    ) -> tuple[dict[str, float], Tensor | None, Tensor | None]:
        """Mean losses of this rank's parts; h_T and h'_S (B, N, D) for the discriminator, where there is one."""
        optimizer, config = self.optimizers["student"], self.config
        with watch.stage("view"):
            batch = self.feed.at(step)
        # Modules with random numbers of their own (drop-out in the student) draw from this step's seed.
        rank = f" {self.among.rank}" if self.among.rank else ""
        torch.manual_seed(step_seed(config.seed, step, f"student{rank}"))
        weights = self.objective.weights(step / self.batches.steps)
        optimizer.zero_grad(set_to_none=True)
        seen: dict[str, float] = {}
        real, fake = [], []
        for number, part in enumerate(batch):
            found, target = self._part(step, number, part, watch)
            for name, loss in found.losses.items():
                seen[name] = seen.get(name, 0.0) + loss.item() / len(batch)
            total = torch.stack([weights[t] * loss for t, loss in found.losses.items()]).sum()
            with watch.stage("backward"):
                (total / len(batch)).backward()
            if found.fake is not None and target is not None:
                fake.append(found.fake)
                real.append(target)
        with watch.stage("optimizer"):
            ranks.average_gradients(self._trained, self.among)
            for group in optimizer.param_groups:
                group["lr"] = loop.learning_rate(step, self.batches.steps, config.lr)
            optimizer.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.student)
        return seen, torch.cat(real) if real else None, torch.cat(fake) if fake else None

    @property
    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizers["student"].param_groups for p in group["params"]]

    def _part(
        self, step: int, number: int, part: Batch, watch: stopwatch.Stopwatch
    ) -> tuple[Found, Tensor | None]:
        """The losses of one part of a step, with their graph, and what h'_S is held against."""
        objective, chosen = self.objective, part.chosen
        taught = None
        if self.features is not None:
            taught = self.features.tokens(step, part, watch)
            self._prefetch(step, number)
        ids = self.store.records(chosen.rows, chosen.ks)
        pixels = part.views.to(self.place).float()
        if "trans" in objective.terms:
            with watch.stage("view"):
                seeds = [step_seed(self.config.seed, step, f"trans {i}") for i in ids]
                pixels = self.config.cakd.trans(part.views.to(self.place), seeds)
        with watch.stage("student"), self._autocast():
            inputs = views.normalise(pixels, self.preprocess)
            if self.config.compute.channels_last:
                inputs = inputs.contiguous(memory_format=torch.channels_last)
            logits = self._forward(inputs)
        features = {module: feature.float() for module, feature in self._taps.features.items()}
        seen = Seen(
            logits=logits.float(),
            embedding=self._taps.embedding.float(),
            feature=features[self.tap.module] if self.tap else None,
            stages=[features[module] for module in self._stages],
            labels=torch.from_numpy(chosen.labels).to(self.place),
            key=Key(self.config.seed, torch.from_numpy(ids).to(self.place), step),
            progress=step / self.batches.steps,
        )
        found = objective(seen, taught, part.labelled, watch, self._autocast)
        target = objective.target(taught.h) if found.fake is not None and taught else None
        return found, target

    def _autocast(self) -> AbstractContextManager[Any]:
        return self.config.compute.autocast(self.place)

    def _prefetch(self, step: int, number: int) -> None:
        """Let the store begin to read what the next part will ask for."""
        assert self.features is not None
        coming = self.feed.chosen(step)[number + 1 :]
        if not coming and step + 1 < self.batches.steps:
            coming = self.feed.chosen(step + 1)
        if coming:
            self.features.prefetch(coming[0])

    def _discriminator_step(self, real: Tensor, fake: Tensor) -> dict[str, float]:
        """Eq. 8 on detached fakes, after the student's backward (decision 11)."""
        assert self.objective.discriminator is not None
        loss, accuracy = robust.discriminator(self.objective.discriminator, real, fake)
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        loss.backward()
        ranks.average_gradients(self.objective.discriminator.parameters(), self.among)
        self.optimizers["discriminator"].step()
        return {"discriminator": loss.item(), "discriminator_accuracy": accuracy.item()}
