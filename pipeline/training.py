"""The loop of Algorithm 1: student and projectors every iteration, the discriminator every fifth, then only the
student is kept. Every draw is a function of (seed, step), so a killed run goes on to the same bits.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from pipeline import (
    compute,
    data,
    files,
    losses,
    models,
    progress,
    runtime,
    students,
    teacher,
    views,
)
from pipeline import config as configs
from pipeline.compute import Compute
from pipeline.errors import UserError
from pipeline.kernels.philox import Key
from pipeline.methods.cakd import CakdConfig, Projectors
from pipeline.methods.logits import LogitsConfig
from pipeline.methods.objective import Found, Objective
from pipeline.methods.table import Terms, reads, refuse_unread, settings, terms_of
from pipeline.methods.term import Seen, Sizes, TeacherSpace
from pipeline.store.policy import Cache
from pipeline.store.reading import Store
from pipeline.students import Tap, Taps, find_tap

PERF_SCHEMA = "cakd.train/1"
SIGNAL_SECONDS = 1.0  # to wait for the signal that tells of a worker whose pipe has gone
STAGES = (
    *("read", "view", "replay", "student", "projector", "terms", "adversarial"),
    *("backward", "optimizer"),
)


@dataclass(frozen=True)
class Distill:
    """`distill:` which student, by which methods, with one recipe for all of them."""

    methods: tuple[str, ...]
    student: str
    student_kwargs: dict[str, Any] = field(default_factory=dict)  # timm's: output_stride, ...
    epochs: int = 30  # passes over all training images; fixes the steps of every method
    batch: int = 64
    lr: float = 2e-3  # peak; linear warm-up over 5 % of the steps, then cosine to 0
    weight_decay: float = 0.05
    labelled_share: float = 0.125  # of a batch, where not every image shows its label (decision 17)
    seed: int = 0
    workers: int = 0  # processes that make the views of coming steps; 0: made when they are needed
    checkpoint_every: int = 200  # steps
    logits: LogitsConfig = LogitsConfig()
    cakd: CakdConfig = CakdConfig()
    terms: Terms = Terms()
    compute: Compute = Compute()

    def __post_init__(self) -> None:
        for method in self.methods:
            terms_of(method)
        for name, least in (("epochs", 1), ("batch", 2), ("workers", 0), ("checkpoint_every", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")
        if self.lr <= 0 or self.weight_decay < 0:
            raise ValueError(
                f"lr, weight_decay are {self.lr}, {self.weight_decay}; allowed: lr > 0, decay >= 0"
            )
        if not 0 < self.labelled_share < 1:
            raise ValueError(f"labelled_share is {self.labelled_share}; allowed: between 0 and 1")


@dataclass(frozen=True)
class Stream:
    """An endless order of rows, pass after pass, each pass a permutation: a function of (seed, name, position)."""

    rows: NDArray[np.int64]
    seed: int
    name: str

    def take(self, start: int, count: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Rows at positions start .. start + count, and the pass each belongs to."""
        passes, places = np.divmod(np.arange(start, start + count), len(self.rows))
        order = np.array(
            [
                _order(len(self.rows), self.seed, self.name, int(e))[p]
                for e, p in zip(passes, places, strict=True)
            ],
            dtype=np.int64,
        )
        return self.rows[order], passes


@lru_cache(maxsize=4)
def _order(n: int, seed: int, name: str, epoch: int) -> NDArray[np.int64]:
    return data.permutation(n, seed, name, epoch)


class Batches:
    """Which rows and views make the batch of a step, and which of them show a label (decision 17)."""

    def __init__(
        self, config: Distill, prepared: data.Prepared, distilled: bool, n_views: int
    ) -> None:
        rows = prepared.rows("train")
        shown = rows[prepared.student_label[rows]]
        self.prepared, self.batch, self.n_views = prepared, config.batch, n_views
        self.steps = config.epochs * -(-len(rows) // config.batch)
        self.distilled = distilled
        self.labels_seen = len(shown)
        if not distilled:
            self.parts = [(Stream(shown, config.seed, "labelled"), config.batch, True)]
        elif len(shown) == len(rows):
            self.parts = [(Stream(rows, config.seed, "all"), config.batch, True)]
        else:
            share = max(config.labelled_share, len(shown) / len(rows))
            labelled = min(max(1, round(share * config.batch)), config.batch - 1)
            self.parts = [
                (Stream(shown, config.seed, "labelled"), labelled, True),
                (Stream(rows, config.seed, "all"), config.batch - labelled, False),
            ]

    def __call__(self, step: int) -> Chosen:
        """What makes the batch of a step; labels are -1 where the student is shown none.

        With a teacher the view is one of the V the store knows; without one every pass draws a fresh view.
        """
        rows, ks, labels = [], [], []
        for stream, count, with_label in self.parts:
            part, passes = stream.take(step * count, count)
            rows.append(part)
            ks.append(passes % self.n_views if self.distilled else passes)
            known = self.prepared.labels[part]
            labels.append(known if with_label else np.full_like(known, data.UNLABELLED))
        return Chosen(np.concatenate(rows), np.concatenate(ks), np.concatenate(labels))


@dataclass(frozen=True)
class Chosen:
    """Rows (B,), view numbers (B,) and labels (B,) of a step, or of a part of it."""

    rows: NDArray[np.int64]
    ks: NDArray[np.int64]
    labels: NDArray[np.int64]

    def part(self, number: int, of: int) -> Chosen:
        """Every `of`-th image from `number` on: labelled images are spread over the parts."""
        mine = slice(number, None, of)
        return Chosen(self.rows[mine], self.ks[mine], self.labels[mine])


@dataclass(frozen=True)
class Batch:
    """A part of one step: what was chosen, its views (B, 3, S, S) uint8, labelled images a part on average."""

    chosen: Chosen
    views: Tensor
    labelled: float


class Feed(Dataset[list[Batch]]):
    """This rank's parts of every step, made ahead by `workers` processes, or here; the same bits either way."""

    def __init__(
        self,
        batches: Batches,
        geometry: views.Geometry,
        seed: int,
        workers: int,
        parts: int = 1,
        among: runtime.Ranks = runtime.ALONE,
    ) -> None:
        self.batches, self.geometry, self.seed, self.workers = batches, geometry, seed, workers
        self.parts, self.among = parts, among
        self._next = -1
        self._coming: Iterator[list[Batch] | UserError] = iter(())

    def chosen(self, step: int) -> list[Chosen]:
        """What makes this rank's parts of a step."""
        whole = self.batches(step)
        mine = range(self.among.rank, self.parts, self.among.size)
        return [whole.part(number, self.parts) for number in mine]

    def __getitem__(self, step: int) -> list[Batch]:
        labelled = float((self.batches(step).labels >= 0).sum()) / self.parts
        images = self.batches.prepared.images
        return [
            Batch(c, views.view_batch(images, self.geometry, self.seed, c.rows, c.ks), labelled)
            for c in self.chosen(step)
        ]

    def at(self, step: int) -> list[Batch]:
        """This rank's parts of a step; cheapest when asked in turn."""
        if self.workers == 0:
            return self[step]
        if step != self._next:
            self._coming = iter(self._loader(step))
        self._next = step + 1
        try:
            coming = next(self._coming)
        except (EOFError, OSError) as error:  # its end of a pipe or of a socket has gone
            if str(error).startswith("Caught"):
                raise
            with suppress(RuntimeError):  # torch's own word of it: taken here, not in a destructor
                time.sleep(SIGNAL_SECONDS)
            raise self._killed(error) from None
        if isinstance(coming, UserError):
            raise coming
        return coming

    def close(self) -> None:
        """Let the workers go."""
        self._coming, self._next = iter(()), -1

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Raise UserError where a worker dies: torch tells it by a signal, so anywhere in the body."""
        try:
            yield
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise self._killed(error) from None

    def _killed(self, error: Exception) -> UserError:
        found = f"{type(error).__name__}: {error}".splitlines()[0][:80]
        return UserError(
            f"distill.workers: one of {self.workers} was killed ({found}); free memory, or lower distill.workers "
            "or distill.batch, then run again to go on"
        )

    def _loader(self, start: int) -> DataLoader[Any]:
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(start, max(start + 1, self.batches.steps)),
            num_workers=self.workers,
            collate_fn=_shared,
            worker_init_fn=runtime.as_worker,
            generator=torch.Generator(),  # its own: the step's random numbers stay untouched
        )


def _shared(parts: list[Batch]) -> list[Batch] | UserError:
    """The views in shared memory, or why not. Left to the queue, a failure would be waited for without end."""
    try:
        for part in parts:
            part.views.share_memory_()
    except RuntimeError as error:
        return UserError(
            f"distill.workers: a worker found no shared memory ({str(error).splitlines()[0]}); enlarge /dev/shm "
            "(docker: --shm-size), or set distill.workers: 0, then run again to go on"
        )
    return parts


class Features:
    """The teacher's tokens of a batch: from the store and its replayed block, or from the live teacher."""

    CHECK_EVERY = 1000  # records between two whose view is held against the stored hash

    def __init__(self, opened: Store, teacher_path: Path, place: torch.device) -> None:
        self.store, self.place = opened, place
        self.live = None if opened.cached else teacher.load(teacher_path).to(place)
        replays = opened.cached and opened.replayed
        self.tail = teacher.load_tail(teacher_path).to(place) if replays else None
        self._checked = False

    def tokens(self, step: int, batch: Batch, watch: runtime.Stopwatch) -> teacher.Tokens:
        """Tokens of the batch. Raises UserError: damaged records, or views that are not the cached ones."""
        if self.live is not None:
            with watch.stage("replay"):
                return self.live(batch.views.to(self.place))  # type: ignore[no-any-return]
        with watch.stage("read"):
            found = self.store.read(self.store.records(batch.chosen.rows, batch.chosen.ks))
            self._check(step, batch, found.view_hash)
        with watch.stage("replay"):
            return found.to(self.place).tokens(self.tail)

    def prefetch(self, chosen: Chosen) -> None:
        """Let the store read what comes next."""
        if self.live is None:
            self.store.prefetch(self.store.records(chosen.rows, chosen.ks))

    def _check(self, step: int, batch: Batch, hashes: NDArray[np.uint64]) -> None:
        """Every view of the first batch, then one record in CHECK_EVERY."""
        seen = step * len(hashes) + np.arange(len(hashes))
        chosen = np.flatnonzero(seen % self.CHECK_EVERY == 0 if self._checked else seen >= 0)
        self._checked = True
        if len(chosen):
            views.check_hashes(batch.views[chosen], hashes[chosen], batch.chosen.rows[chosen])


class Trainer:
    """One student, one method: everything a step needs, and the step."""

    def __init__(
        self,
        config: Distill,
        method: str,
        prepared: data.Prepared,
        teacher_path: Path,
        features: Path,
        policy: Cache | None = None,
        among: runtime.Ranks = runtime.ALONE,
    ) -> None:
        torch.manual_seed(config.seed)
        self.config, self.method, self.prepared, self.among = config, method, prepared, among
        self.place = compute.place(config.compute.device, "distill.compute.device", among)
        self.student = models.create(
            config.student, config.student_kwargs, len(prepared.classes), "distill"
        )
        self.preprocess = models.preprocessing(self.student, prepared.image_size)
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
        compute.same_start((self.student, self.objective), among)
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
        tap, found = None, students.anatomy(self.student, prepared.image_size)
        if "stages" in reads(self.method, "student"):
            students.refuse_without_maps(self.student, found)
        if "tap" in reads(self.method, "student"):
            grid = tuple(models.describe(teacher_path)["grid"])
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

    def step(self, step: int, watch: runtime.Stopwatch) -> dict[str, float]:
        """One iteration of Algorithm 1; the unweighted losses."""
        seen, real, fake = self._student_step(step, watch)
        due = step % self.config.cakd.discriminator_every == 0
        if due and fake is not None and real is not None:
            with watch.stage("adversarial"):
                seen |= self._discriminator_step(real, fake)
        watch.next_step()
        return compute.average_figures(seen, self.place, self.among)

    def _student_step(
        self, step: int, watch: runtime.Stopwatch
    ) -> tuple[dict[str, float], Tensor | None, Tensor | None]:
        """Mean losses of this rank's parts; h_T and h'_S (B, N, D) for the discriminator, where there is one."""
        optimizer, config = self.optimizers["student"], self.config
        with watch.stage("view"):
            batch = self.feed.at(step)
        # Modules with random numbers of their own (drop-out in the student) draw from this step's seed.
        rank = f" {self.among.rank}" if self.among.rank else ""
        torch.manual_seed(runtime.step_seed(config.seed, step, f"student{rank}"))
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
            compute.average_gradients(self._trained, self.among)
            for group in optimizer.param_groups:
                group["lr"] = runtime.learning_rate(step, self.batches.steps, config.lr)
            optimizer.step()
            if self.averaged is not None:
                self.averaged.update_parameters(self.student)
        return seen, torch.cat(real) if real else None, torch.cat(fake) if fake else None

    @property
    def _trained(self) -> list[Tensor]:
        return [p for group in self.optimizers["student"].param_groups for p in group["params"]]

    def _part(
        self, step: int, number: int, part: Batch, watch: runtime.Stopwatch
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
                seeds = [runtime.step_seed(self.config.seed, step, f"trans {i}") for i in ids]
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
        loss, accuracy = losses.discriminator(self.objective.discriminator, real, fake)
        self.optimizers["discriminator"].zero_grad(set_to_none=True)
        loss.backward()
        compute.average_gradients(self.objective.discriminator.parameters(), self.among)
        self.optimizers["discriminator"].step()
        return {"discriminator": loss.item(), "discriminator_accuracy": accuracy.item()}


def distill(
    config: Distill,
    method: str,
    prepared: data.Prepared,
    teacher_path: Path,
    features: Path,
    out: Path,
    work: Path,
    policy: Cache | None = None,
    among: runtime.Ranks = runtime.ALONE,
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
    made_by = files.provenance(recipe, **inputs) | prepared.made_of() | {"method": method}
    with runtime.work_folder(work, files.digest([made_by, files.code()]), among) as folder:
        trainer = Trainer(config, method, prepared, teacher_path, features, policy, among)
        watch = runtime.Stopwatch(trainer.place)
        steps = trainer.batches.steps
        tell = progress.Progress(
            f"distill {method}",
            steps,
            batch=config.batch,
            epoch=steps // config.epochs,
            quiet=among.rank > 0,
        )
        with trainer.feed.watched(), closing(trainer.feed):
            curves = runtime.run_steps(
                tell,
                config.checkpoint_every,
                folder / "checkpoint.safetensors",
                trainer.modules,
                trainer.optimizers,
                lambda step: trainer.step(step, watch),
                among,
            )
        figures = _figures(trainer, watch, curves)
        if among.rank == 0:
            with files.atomic_dir(out) as finished:
                _publish(trainer, finished, made_by)
    return figures


def _publish(trainer: Trainer, folder: Path, made_by: dict[str, Any]) -> None:
    config, prepared = trainer.config, trainer.prepared
    projectors, space = trainer.objective.projectors(), TeacherSpace.of(trainer.store.manifest)
    tap = trainer.tap if projectors else None
    models.save(
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


def load_projectors(folder: Path, description: dict[str, Any]) -> Projectors | None:
    """The projectors beside a CAKD student, for evaluation only; None where the method has not both."""
    if description["tap"] is None:
        return None
    cakd = configs.parse(CakdConfig, description["cakd"], f"{folder}: cakd")
    tap = configs.parse(Tap, description["tap"], f"{folder}: tap")
    projectors = Projectors(cakd, tap, TeacherSpace.of(description["space"]))
    models.load_weights(projectors, folder / "projectors.safetensors")
    return projectors.eval()


def _figures(
    trainer: Trainer, watch: runtime.Stopwatch, curves: list[runtime.Figures]
) -> dict[str, Any]:
    """Speed and curves of one training, as train/<method>.json holds them."""
    timed = [s for s in watch.steps if s][2:] or [s for s in watch.steps if s]
    totals = [sum(s.values()) for s in timed] or [float("nan")]
    rates = [1e3 * trainer.config.batch / t for t in totals]
    quartiles = statistics.quantiles(rates, n=4) if len(rates) > 1 else [rates[0]] * 3
    stage_ms = {
        n: statistics.median(s.get(n, 0.0) for s in timed) if timed else 0.0 for n in STAGES
    }
    waiting = sum(s.get("read", 0.0) + s.get("view", 0.0) for s in timed)
    return {
        "img_per_s": {"median": statistics.median(rates), "iqr": quartiles[2] - quartiles[0]},
        "stage_ms": stage_ms,
        "stall_fraction": waiting / sum(totals),
        "peak_mb": runtime.peak_memory_mb(),
        "steps": trainer.batches.steps,
        "batch": trainer.config.batch,
        "labels_seen": trainer.batches.labels_seen,
        "curves": _thinned(curves),
    }


def _thinned(curves: list[dict[str, float]], points: int = 200) -> dict[str, list[list[float]]]:
    """term -> [[step, mean], ...]: each of at most `points` windows by its mean."""
    terms = sorted({t for row in curves for t in row} - {"step"})
    window = max(1, -(-len(curves) // points))
    thin: dict[str, list[list[float]]] = {t: [] for t in terms}
    for at in range(0, len(curves), window):
        rows = curves[at : at + window]
        for term in terms:
            values = [r[term] for r in rows if term in r]
            if values:
                thin[term].append([rows[-1]["step"] + 1, statistics.fmean(values)])
    return thin
