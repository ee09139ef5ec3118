"""How long a run takes on this machine: its own stages on a few generated images, before it starts."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import nn

from pipeline import teach
from pipeline.core import config
from pipeline.data.prepared import Prepared
from pipeline.distill import distill
from pipeline.distill.settings import Distill
from pipeline.evaluate import accuracy
from pipeline.models import checkpoint, teacher
from pipeline.prepare import prepare
from pipeline.prepare.settings import Prepare
from pipeline.store import policy, writing

PER_CLASS, CLASSES = 16, 8  # of the generated images
PASSES = 4  # of the teacher that are timed
STEPS = 10  # of each student


@dataclass(frozen=True)
class Sizes:
    """What the length of a run depends on: images by split."""

    images: int
    train: int
    labelled: int  # of train: what the teacher sees
    test: int  # with a label


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine."""

    image: float  # of an image that is prepared
    teacher_image: float  # of an image in a pass of the teacher
    view: float  # of a view that is cached
    step: float  # of a step of every student together
    test_image: float  # of a test image through teacher and students, clean and noisy

    def minutes(self, sizes: Sizes, passes: int, views: int, steps: int) -> dict[str, float]:
        """The minutes of every stage whose length depends on the images or on the budgets of params.yaml."""
        seconds = {
            "prepare": self.image * sizes.images,
            "teach": self.teacher_image * sizes.labelled * passes,
            "cache": self.view * sizes.train * views,
            "distill": self.step * steps,
            "evaluate": self.test_image * sizes.test,
        }
        return {stage: value / 60 for stage, value in seconds.items()}


def rehearse(params: Mapping[str, Any], reading: float) -> Costs:
    """Run prepare, teach, cache, distill and evaluate of `params` on generated images, and time them.

    `reading` is the time in seconds of reading one of the real images. Weights are drawn, not downloaded. Takes
    seconds for a small teacher, a minute for a ViT-B on a CPU. Raises UserError: as these stages.
    """
    hushed = contextlib.redirect_stdout(io.StringIO())
    with tempfile.TemporaryDirectory() as folder, hushed:
        return _Rehearsal(params, Path(folder)).costs(reading)


@dataclass(frozen=True)
class _Rehearsal:
    """The stages on generated images in `folder`."""

    params: Mapping[str, Any]
    folder: Path

    def settings(self, kind: type[Any], **changes: Any) -> Any:
        name = kind.__name__.lower()
        return dataclasses.replace(config.parse(kind, self.params[name], name), **changes)

    def costs(self, reading: float) -> Costs:
        side = self.params["prepare"]["image_size"]
        _generate(self.folder / "images", 2 * side)
        own = {
            "source": "imagefolder",
            "path": str(self.folder / "images"),
            "student_labels": "all",
        }
        held_out = {"val": CLASSES, "test": 2 * CLASSES, "label_column": None, "image_column": None}
        asked = self.settings(Prepare, **own, **held_out, label_pattern=None)
        images = PER_CLASS * CLASSES
        image = reading + _timed(lambda: prepare.prepare(asked, self.folder / "prepared")) / images
        prepared = Prepared.open(self.folder / "prepared")

        teacher_image = self._longer(self._teach(prepared), PASSES) / len(prepared.rows("train"))
        path = self.folder / f"teacher-{1 + PASSES}" / "teacher.safetensors"
        view = self._longer(self._cache(prepared, path), 1) / len(prepared.rows("train"))
        features = self.folder / "features-2"
        step, students = 0.0, []
        every = self.settings(Distill)
        for method in every.methods:
            students.append(self.folder / method)
            short = dataclasses.replace(every, steps=STEPS, epochs=None)
            arguments = (short, method, prepared, path, features, students[-1])
            figures = distill.distill(*arguments, self.folder / "work")
            # the ratios of the gradients are logged at every one of these steps, and seldom later
            step += sum(ms for name, ms in figures["stage_ms"].items() if name != "ratios") / 1e3
        weights = [path, *(student / "student.safetensors" for student in students)]
        models = [checkpoint.load(weight) for weight in weights]
        test_image = _timed(lambda: [self._test(prepared, *model) for model in models])
        return Costs(image, teacher_image, view, step, test_image / (2 * CLASSES))

    def _teach(self, prepared: Prepared) -> Callable[[int], object]:
        def run(passes: int) -> object:
            settings = self.settings(teach.Teach, weights="scratch", guide=None, epochs=passes)
            out = self.folder / f"teacher-{passes}"
            return teach.teach(settings, prepared, out, self.folder / "work")

        return run

    def _cache(self, prepared: Prepared, path: Path) -> Callable[[int], object]:
        def run(views: int) -> object:
            settings, out = (
                self.settings(policy.Cache, views=views),
                self.folder / f"features-{views}",
            )
            arguments = (settings, prepared, teacher.load(path), out, self.folder / "work")
            return writing.write(*arguments, lambda _: None)

        return run

    def _longer(self, run: Callable[[int], object], more: int) -> float:
        """Seconds that each of `more` units adds to one, so that what is done once does not count."""
        short, long = _timed(lambda: run(1)), _timed(lambda: run(1 + more))
        return max(long - short, 1e-6) / more

    def _test(self, prepared: Prepared, model: nn.Module, description: dict[str, Any]) -> object:
        settings = self.settings(accuracy.Evaluate)
        return accuracy.accuracy(model, description["preprocess"], prepared, settings)


def _timed(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _generate(folder: Path, side: int) -> None:
    """Smooth pictures in class folders: they compress and decode as photographs do, not as noise."""
    draw = np.random.default_rng(0)
    for number in range(PER_CLASS * CLASSES):
        small = Image.fromarray(draw.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        path = folder / f"class{number % CLASSES}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC).save(path)
