"""What distillation gained over `plain` and the control, and what to do where it gained nothing. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]
BETTER_TEACHER = "use a stronger or pretrained teacher, or more unlabelled images"


@dataclass(frozen=True)
class Gain:
    """A difference of clean top-1 in percentage points with its 95 % interval; None in files without one."""

    points: float
    interval: tuple[float, float] | None

    @property
    def proven(self) -> bool:
        """Whether all of the interval, or without one the difference, is above 0."""
        return (self.interval[0] if self.interval else self.points) > 0

    def __str__(self) -> str:
        """ "+7.5 [+3.1, +11.9]", in points."""
        ends = f" [{', '.join(map(points, self.interval))}]" if self.interval else ""
        return f"{points(self.points)}{ends}"


def gain(summary: Summary, model: str | None = None, baseline: str = "plain") -> Gain | None:
    """What a model, or else the exported student, is above a baseline; None where one of them was not judged."""
    models, name = summary["models"], model or summary["shipped"]
    if found := models.get(name, {}).get("against", {}).get(baseline):
        return Gain(found["points"], (found["low"], found["high"]))
    if name not in models or baseline not in models:
        return None
    own, other = (models[n]["clean"]["top1"] for n in (name, baseline))
    return Gain(round(100 * (own - other), 4), None)


def no_gain(summary: Summary) -> list[str]:
    """Why nothing was gained, each reason a sentence; empty where something was, or `plain` was not judged."""
    return list(_reasons(summary)) if gain(summary) else []


def _reasons(summary: Summary) -> Iterator[str]:
    shipped, models = summary["shipped"], summary["models"]
    teacher = gain(summary, "teacher")
    if teacher and teacher.points <= 0:
        yield f"the teacher is not better than plain ({_percent(models, 'plain')} %)"
    if shipped == "plain":
        chosen = summary.get("selection", {}).get("reason")
        yield f"plain is exported{f' ({chosen})' if chosen else ''}"
    for baseline in dict.fromkeys(("plain", *models[shipped].get("against", {}))):
        compared = gain(summary, baseline=baseline)
        if shipped != baseline and compared and not compared.proven:
            what = baseline if baseline == "plain" else f"its control {baseline}"
            yield f"{shipped} is not better than {what}, {compared} points"


def _percent(models: Mapping[str, Any], name: str) -> str:
    return f"{100 * models[name]['clean']['top1']:.1f}"


def advice(summary: Summary) -> str:
    """What to do about a run without a gain."""
    return BETTER_TEACHER if summary["shipped"] == "plain" else f"{BETTER_TEACHER}, or ship plain"


def points(value: float | None) -> str:
    """A difference in percentage points, signed: "+1.3"; a dash where there is nothing to compare."""
    if value is None:
        return "–"
    rounded = round(value, 1) + 0.0  # no minus zero
    return f"{rounded:+.1f}".replace("-", "−")
