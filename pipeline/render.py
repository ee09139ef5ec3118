"""Summaries (`cakd.edge/1`, one a machine) -> Markdown for CI and a self-contained page for people. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline import charts, wording
from pipeline.report import BASELINES

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = (
    *("figure", "percent", "points", "millions", "top1"),
    *("labels", "p50", "speedup", "precision", "parity", "status", "flat"),
)
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def markdown(summaries: Sequence[Mapping[str, Any]]) -> str:
    """The report as GitHub Markdown, made for `$GITHUB_STEP_SUMMARY`; whatever a file named is escaped."""
    return _fill("edge.md", summaries, autoescape=False, finalize=escape_markdown)


def page(summaries: Sequence[Mapping[str, Any]], gallery: Mapping[str, Any] | None = None) -> str:
    """The report as one HTML file: no script, no other file, nothing from the network.

    `gallery` is that of a single run (`gallery.gallery`); a page of several machines has none.
    """
    pictures = [_pictures(s, f"m{i}") for i, s in enumerate(summaries)]
    runs = [{**s, **p} for s, p in zip(summaries, pictures)]
    return _fill("index.html", runs, gallery and _drawn(gallery), autoescape=True)


def _drawn(gallery: Mapping[str, Any]) -> dict[str, Any]:
    """The gallery with the chart of its classes and the colours in it."""
    by_series = gallery["data"]["counts"]
    shown = [label for label, values in by_series.items() if any(values)]
    chart = charts.counts(by_series, gallery["data"]["classes"], "classes")
    barred = (
        len(gallery["data"]["classes"]) <= charts.BARS
    )  # a histogram has one colour and no legend
    drawn = {"chart": Markup(chart), "colours": charts.method_colours(shown) if barred else {}}
    return {**gallery, "data": {**gallery["data"], **drawn}}


def escape_markdown(value: object) -> str:
    """A value as text that Markdown and HTML leave as it is, in one line, whole inside a table cell."""
    return MARKDOWN.sub(r"\\\1", " ".join(str(value).replace("&", "&amp;").split()))


def unbroken(text: str) -> str:
    """Text whose names (`ort-fp32`) and units stay on the line of what they belong to."""
    return re.sub(r"(?<=\d) (?=%|ms)", "\u00a0", text).replace("-", "\u2011")


def _fill(
    template: str,
    summaries: Sequence[Mapping[str, Any]],
    gallery: Mapping[str, Any] | None = None,
    **escaping: Any,
) -> str:
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        **escaping,
    )
    environment.filters.update({name: getattr(wording, name) for name in FILTERS})
    environment.filters |= {"unbroken": unbroken, "thousands": "{:,}".format}
    return environment.get_template(template).render(
        runs=[_worded(s) for s in summaries],
        gallery=gallery,
        several=len(summaries) > 1,
        baselines=BASELINES,
        unmeasured=wording.NONE,
    )


def _worded(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A summary with the sentences made from several of its figures."""
    return {
        **summary,
        "machine_name": wording.machine_name(summary["machine"]),
        "headline": wording.headline(summary),
        "cards": wording.cards(summary),
        "cosines": wording.cosines(summary["models"]),
        "circumstances": wording.circumstances(summary["targets"]),
        "labels": wording.labels_in_words(summary["models"]),
        "more": [(t["target"], row) for t in summary["targets"] for row in t["more_threads"]],
    }


def _pictures(summary: Mapping[str, Any], name: str) -> dict[str, Any]:
    """The pictures of one summary, with ids that begin with `name`, and the colours of the methods in them."""
    training = summary["training"]
    scatter = charts.scatter(summary, f"{name}-scatter")
    strips = charts.strips(summary, f"{name}-strips")
    return {
        "scatter": scatter and Markup(scatter),
        "strips": strips and Markup(strips),
        "curves": [(t, Markup(svg)) for t, svg in charts.curves(training, f"{name}-curve")],
        "colours": charts.method_colours(list(training)),
    }
