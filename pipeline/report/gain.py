"""Gain of distillation over `plain` and the control, and advice where there is none. Torch-free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

Summary = Mapping[str, Any]
BETTER_TEACHER = (
    "use a stronger or pretrained teacher (RECIPE=imagefolder), or more unlabelled images"
)


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
    """Gain of a model (default: the exported student) over a baseline; None where one was not evaluated."""
    models, name = summary["models"], model or summary["shipped"]
    if paired := models.get(name, {}).get("against", {}).get(baseline):
        return Gain(paired["points"], (paired["low"], paired["high"]))
    if name not in models or baseline not in models:
        return None
    own, other = (models[n]["clean"]["top1"] for n in (name, baseline))
    return Gain(round(100 * (own - other), 4), None)


def no_gain(summary: Summary) -> list[str]:
    """Reasons why nothing was gained, as sentences; empty where something was, or `plain` was not evaluated."""
    return list(_reasons(summary)) if gain(summary) else []


def _reasons(summary: Summary) -> Iterator[str]:
    shipped, models = summary["shipped"], summary["models"]
    teacher = gain(summary, "teacher")
    if teacher and teacher.points <= 0:
        yield f"the teacher is not better than plain ({_percent(models, 'plain')} %)"
    if shipped == "plain":
        reason = summary.get("selection", {}).get("reason")
        yield f"plain is exported{f' ({reason})' if reason else ''}"
    for baseline in dict.fromkeys(("plain", *models[shipped].get("against", {}))):
        compared = gain(summary, baseline=baseline)
        if shipped != baseline and compared and not compared.proven:
            what = baseline if baseline == "plain" else f"its control {baseline}"
            yield f"{shipped} is not better than {what}, {compared} points"


def _percent(models: Mapping[str, Any], name: str) -> str:
    return f"{100 * models[name]['clean']['top1']:.1f}"


def advice(summary: Summary) -> str:
    """Advice for a run without a gain."""
    return BETTER_TEACHER if summary["shipped"] == "plain" else f"{BETTER_TEACHER}, or export plain"


def points(value: float | None) -> str:
    """A difference in percentage points, signed: "+1.3"; a dash where there is nothing to compare."""
    if value is None:
        return "–"
    rounded = round(value, 1) + 0.0  # no minus zero
    return f"{rounded:+.1f}".replace("-", "−")
