"""The recipe and the budgets for somebody's images, where none was named: by the images, labels and machine."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pipeline.core import config
from pipeline.prepare.prepare import assign_splits
from pipeline.prepare.settings import Prepare
from pipeline.prepare.survey import Survey
from pipeline.project.rehearsal import Costs, Sizes

SMALL = 40  # pixels of the shorter side up to which the recipes of 32 px lose nothing
FEW = 0.5  # share of the images with a label, below which the others decide
PER_CLASS = 100  # labels a class that are few
# The teacher sees no fewer batches than that of the default run: 60 passes over 1,297 digits.
TEACHER_STEPS, MOST_PASSES = 1260, 400
# An allowance for export, builds, latency and starting the stages, not a measurement: on digits the first three
# took 1.1 minutes (AMD EPYC, 2 cores); larger networks take longer.
OTHER_MINUTES = 5.0
LIMIT_MINUTES = 55.0  # of a run on a CPU, so that it ends within the hour
LEAST = {"passes": 10, "views": 2, "steps": 300}

Values = dict[str, dict[str, Any]]  # section -> key -> value


@dataclass(frozen=True)
class Choice:
    """A recipe, the values that the images need beside it, and why, in a sentence."""

    recipe: str
    reason: str
    values: Values = field(default_factory=dict)


def choose(surveyed: Survey, gpu: bool) -> Choice:
    """Choose by the number and size of the images, the share with a label, and the machine.

    Photographs on a GPU get the recipe that fine-tunes a pretrained ViT; on a CPU the small one at 64 px. Small
    images of which few show a label get that of few labels; the student sees every label there is.
    """
    share = surveyed.labelled / surveyed.images
    few = share < FEW or surveyed.labelled < PER_CLASS * surveyed.classes
    what = (
        f"{surveyed.images:,} images of {surveyed.classes} classes, {surveyed.side} px, "
        f"{100 * share:.0f} % with a label"
    )
    where = "a GPU" if gpu else "no GPU"
    source: dict[str, Any] = {"source": surveyed.source}
    if surveyed.side <= SMALL and few:
        values = {"prepare": {**source, "student_labels": "all", "val": 0.1}}
        return Choice("few-labels", f"{what}, {where}: small images with few labels", values)
    values = {"prepare": dict(source)}
    if gpu and surveyed.side > SMALL:
        reason = f"{what}, {where}: photographs, a pretrained teacher"
        return Choice("imagefolder", reason, values)
    reason = (
        f"{what}, {where}: a small teacher from scratch at 64 px, a first look; where it stays behind the "
        "student, as with a few thousand photographs, a pretrained one is needed: RECIPE=imagefolder"
    )
    return Choice("imagefolder-mini", reason, values)


def sizes(surveyed: Survey, params: Mapping[str, Any]) -> Sizes:
    """Count the images of every split, as prepare will. Raises UserError: a split larger than the data."""
    splits = assign_splits(surveyed.samples, config.parse(Prepare, params["prepare"], "prepare"))
    labelled = [sample.label is not None for sample in surveyed.samples]
    every = Counter(splits)
    known = Counter(split for split, label in zip(splits, labelled, strict=True) if label)
    return Sizes(surveyed.images, every["train"], known["train"], known["test"])


@dataclass(frozen=True)
class Budget:
    """How long is trained and how much is cached."""

    passes: int  # teach.epochs
    views: int  # cache.views
    steps: int  # distill.steps

    def scaled(self, by: float) -> Budget:
        """All of it times `by`, no value below LEAST and none above what it is."""
        return Budget(
            **{
                name: min(value, max(LEAST[name], round(value * by)))
                for name, value in vars(self).items()
            }
        )

    def values(self) -> Values:
        """As values of params.yaml."""
        return {
            "teach": {"epochs": self.passes},
            "cache": {"views": self.views},
            "distill": {"steps": self.steps},
        }


def budget(params: Mapping[str, Any], images: Sizes) -> Budget:
    """The budget of a recipe; a teacher from scratch makes more passes over few images."""
    teach, steps = params["teach"], params["distill"]["steps"]
    batches = -(-images.labelled // teach["batch"])
    passes = teach["epochs"]
    if teach["weights"] == "scratch":
        passes = max(passes, min(MOST_PASSES, -(-TEACHER_STEPS // batches)))
    return Budget(passes, params["cache"]["views"], steps)


def minutes(costs: Costs, images: Sizes, plan: Budget) -> float:
    """The length of the whole run."""
    return OTHER_MINUTES + sum(costs.minutes(images, **vars(plan)).values())


def within(limit: float, costs: Costs, images: Sizes, plan: Budget) -> Budget:
    """The largest share of a budget that ends within `limit` minutes, or the least where none does."""
    for percent in range(100, 0, -1):
        shorter = plan.scaled(percent / 100)
        if minutes(costs, images, shorter) <= limit:
            return shorter
    return plan.scaled(0)


def duration(costs: Costs, images: Sizes, plan: Budget) -> str:
    """The length of a run in words: `18 min (teach 6, distill 5, ...)`; hours where it is long."""
    stages = costs.minutes(images, **vars(plan)) | {"the rest": OTHER_MINUTES}
    parts = ", ".join(f"{stage} {_words(value)}" for stage, value in stages.items())
    return f"{_words(minutes(costs, images, plan))} ({parts})"


def _words(value: float) -> str:
    if value >= 90:
        return f"{value / 60:.1f} h"
    return f"{value:.0f} min" if value >= 1 else "under a minute"
