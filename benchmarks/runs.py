"""Training runs of one recipe that share images, teacher and features; a finished one is read, not repeated."""

from __future__ import annotations

import argparse
import dataclasses
import io
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from pipeline import teach
from pipeline.core import artifacts, config, progress
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError
from pipeline.data.prepared import Prepared
from pipeline.distill import distill
from pipeline.distill.settings import Distill
from pipeline.evaluate import accuracy, selection
from pipeline.evaluate.corruptions import Pixels, noisy
from pipeline.models import checkpoint
from pipeline.models.teacher import load
from pipeline.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.project import recipes
from pipeline.store import policy, writing
from pipeline.training import compute
from pipeline.training.ranks import SINGLE_PROCESS
from stages.check import SECTIONS

RECIPES = Path("recipes")
WORK = Path(".work/benchmarks")
Run = dict[str, float]


def override(params: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply `distill.cakd.swap_p=0` and the like; values are read as YAML. Raises UserError: no such key."""
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        *folders, last = key.split(".")
        section: Any = params
        for folder in folders:
            section = section.get(folder) if isinstance(section, dict) else None
        if not equals or not isinstance(section, dict) or last not in section:
            raise UserError(
                f"-S: got {assignment!r}; expected key=value with a key of the recipe; correct it"
            )
        section[last] = value(text)


def value(text: str) -> Any:
    """A value of a command line, read as YAML. Raises UserError: it cannot be."""
    try:
        return YAML(typ="safe", pure=True).load(io.StringIO(text))
    except YAMLError as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"got {text!r}; expected a value in YAML ({reason}); correct it") from None


def merged(recipe: str, data: str | None, assignments: Sequence[str]) -> dict[str, Any]:
    """The recipe with these changes, every section checked. Raises UserError: as `recipes.merged`, `override`."""
    params = recipes.merged(recipe, RECIPES, SECTIONS, data)
    override(params, assignments)
    for name, kind in SECTIONS.items():
        config.parse(kind, params.get(name), name)
    return params


def command(module: str, args: argparse.Namespace, *own: str) -> str:
    """The command of a benchmark for its record, without paths of this machine."""
    words = [f"python -m benchmarks.{module} {args.recipe}"]
    words += ["--data PATH"] if args.data else []
    words += [f"--methods {' '.join(args.methods)}"] if args.methods else []
    changes = (re.sub(r"=\S+\.safetensors$", "=PATH", change) for change in args.set)
    return " ".join([*words, *own, *(f"-S {change}" for change in changes)])


def recorded(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters of a recipe for its record, without paths of this machine."""
    teach_section = {**params["teach"], "weights": Path(params["teach"]["weights"]).name}
    return {**params, "prepare": {**params["prepare"], "path": None}, "teach": teach_section}


class KeptNoise:
    """The noisy images of an evaluation, made once a kind: as `corruptions.noisy`, for one split and seed."""

    def __init__(self, folder: Path, prepared: Prepared, settings: accuracy.Evaluate) -> None:
        rows = accuracy.labelled_rows(prepared, settings)
        self.settings, self.prepared, self.rows = settings, prepared, rows
        self.position = {prepared.sha256[row]: at for at, row in enumerate(rows)}
        marks = [settings.split, settings.seed, settings.crop_pct, prepared.hashes()]
        self.folder = folder / artifacts.digest([marks, artifacts.code(("data", "evaluate"))])[:12]

    def __call__(self, _: Pixels, ids: tuple[str, ...], kind: str, seed: int) -> Pixels:
        """The noisy images of `ids`; `seed` is the evaluation's own."""
        path = self.folder / f"{kind}.npy"
        if not path.exists():
            parts = [
                noisy(pixels, tuple(self.prepared.sha256[r] for r in part), kind, seed)
                for part, pixels in accuracy.chunks(
                    self.prepared, self.rows, self.settings.crop_pct
                )
            ]
            with atomic(path) as temporary, temporary.open("wb") as file:
                np.save(file, np.concatenate(parts))
        kept: Pixels = np.load(path, mmap_mode="r")[[self.position[i] for i in ids]]
        return kept


@dataclasses.dataclass(frozen=True)
class Runs:
    """One recipe in `folder`: the images, teacher and features that all its methods share, and their runs."""

    params: dict[str, Any]
    folder: Path

    @classmethod
    def at(cls, recipe: str, params: dict[str, Any], teacher: int = 0) -> Runs:
        """The runs of a recipe, of which nothing is made yet; `teacher` is added to the seed of the teacher."""
        teach_section = {**params["teach"], "seed": params["teach"]["seed"] + teacher}
        params = {**params, "teach": teach_section}
        shared = {name: params[name] for name in ("prepare", "teach", "cache")}
        return cls(params, WORK / f"{recipe}-{artifacts.digest(shared)[:8]}")

    @classmethod
    def of(cls, recipe: str, params: dict[str, Any], teacher: int = 0) -> Runs:
        """Make what the runs of a recipe share, where missing: images, teacher, features."""
        runs = cls.at(recipe, params, teacher)
        runs.make_shared()
        return runs

    def section(self, kind: type[Any]) -> Any:
        """A section of the recipe as its settings."""
        name = kind.__name__.lower()
        return config.parse(kind, self.params.get(name), name)

    @property
    def prepared(self) -> Prepared:
        """The prepared images."""
        return Prepared.open(self.folder / "prepared")

    @property
    def teacher(self) -> Path:
        """The teacher's weights."""
        return self.folder / "teacher" / "teacher.safetensors"

    def make_prepared(self) -> None:
        """Prepare the images unless they are there."""
        if not (self.folder / "prepared").exists():
            prepare.prepare(self.section(Prepare), self.folder / "prepared")

    def make_teacher(self) -> None:
        """Train the teacher unless it is there. Raises UserError: one of other weights or guide is."""
        settings = self.section(teach.Teach)
        files = {n: artifacts.sha256(p) for n, p in teach.weight_files(settings).items()}
        if not self.teacher.exists():
            teach.teach(settings, self.prepared, self.folder / "teacher", self.folder / "work")
            return
        made_from = artifacts.read_json(self.teacher.with_suffix(".json"))["provenance"]["inputs"]
        if made_from != files:
            raise UserError(
                f"{self.teacher}: got teach.weights or teach.guide of another content ({made_from}); expected "
                f"{files}; remove {self.folder}, then run again"
            )

    def make_shared(self) -> None:
        """Prepare the images, train the teacher and cache its features, each unless it is there."""
        self.make_prepared()
        self.make_teacher()
        folder = self.folder
        if not (folder / "features").exists():
            cache = self.section(policy.Cache)
            bar = progress.Progress("cache", cache.views * len(self.prepared.rows("train")))
            work = folder / "work"
            writing.write(cache, self.prepared, load(self.teacher), folder / "features", work, bar)

    def on_test(self, path: Path) -> Run:
        """Top-1 of a model, clean and under noise, as fractions."""
        model, description = checkpoint.load(path)
        settings, prepared = self.section(accuracy.Evaluate), self.prepared
        model.to(compute.pick_device(settings.device, "evaluate.device", SINGLE_PROCESS))
        noise = KeptNoise(self.folder / "noise", prepared, settings)
        result, _ = accuracy.accuracy(model, description["preprocess"], prepared, settings, noise)
        return {"clean": result["clean"]["top1"], "noisy": result["noisy"]["top1"]}

    def on_val(self, path: Path) -> Run:
        """Clean top-1 and negative log-likelihood of a model on val, by which settings are selected."""
        model, description = checkpoint.load(path)
        crop_pct = self.section(accuracy.Evaluate).crop_pct
        result = selection.score(model, description["preprocess"], self.prepared, crop_pct)
        return {"top1": result["top1"], "nll": result["nll"]}

    def run(self, settings: Distill, method: str, seed: int, split: str = "test") -> Run:
        """Train one student and evaluate it on a split; its accuracy and the milliseconds of a step."""
        seeded = dataclasses.replace(settings.of_method(method), seed=seed, methods=(method,))
        features = self.folder / "features"
        mark = artifacts.digest(
            [
                split,
                dataclasses.asdict(seeded),
                self.params["evaluate"],
                artifacts.sha256(features / "manifest.json"),
                artifacts.code((*distill.ROOMS, "evaluate")),
            ]
        )
        finished = self.folder / "runs" / f"{method}-{seed}-{mark[:12]}.json"
        if finished.exists():
            run: Run = artifacts.read_json(finished)
            return run
        out = self.folder / "students" / f"{method}-{mark[:12]}"
        arguments = (seeded, method, self.prepared, self.teacher, features, out)
        figures = distill.distill(*arguments, self.folder / "work")
        judge = self.on_val if split == "val" else self.on_test
        run = judge(out / "student.safetensors")
        run["step_ms"] = sum(figures["stage_ms"].values())
        artifacts.write_json(finished, run)
        return run
