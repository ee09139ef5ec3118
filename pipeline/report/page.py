"""Summaries (`cakd.edge/1`, one a machine) -> Markdown for CI and a self-contained page for people. Torch-free."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from pipeline.report import history, int8, wording
from pipeline.report.charts import (
    bars,
    canvas,
    classes,
    curves,
    ecdf,
    forest,
    layers,
    students,
    timeline,
    tradeoff,
)
from pipeline.report.raw import sampled
from pipeline.report.summary import BASELINES
from pipeline.report.verdict import MODELS

Summary = Mapping[str, Any]
Earlier = Sequence[tuple[str, Summary]]

TEMPLATES = Path(__file__).parent / "templates"
FILTERS = (
    *("figure", "percent", "millions", "top1"),
    *("labels", "p50", "speedup", "precision", "parity", "status", "flat"),
    *("ratio", "interval", "clock", "day", "counted", "p50_interval", "details", "left_out"),
    *("p99", "over_deadline", "energy", "without_energy", "placed_on"),
    "lost",
)
MARKDOWN = re.compile(r"([\\`*_{}\[\]<>|#~$])")


def markdown(summaries: Sequence[Summary], earlier: Earlier = ()) -> str:
    """The report as GitHub Markdown, made for `$GITHUB_STEP_SUMMARY`; whatever a file named is escaped."""
    return _fill(
        "edge.md", _with_history(summaries, earlier), autoescape=False, finalize=escape_markdown
    )


def page(
    summaries: Sequence[Summary],
    gallery: Mapping[str, Any] | None = None,
    earlier: Earlier = (),
) -> str:
    """The report as one HTML file: no script, no other file, nothing from the network.

    `gallery` is that of a single run (`gallery.gallery`); a page of several machines has none.
    """
    runs = [
        {**run, **_charts(run, f"m{i}")} for i, run in enumerate(_with_history(summaries, earlier))
    ]
    return _fill("index.html", runs, gallery and _with_chart(gallery), autoescape=True)


def _with_history(summaries: Sequence[Summary], earlier: Earlier) -> list[dict[str, Any]]:
    return [{**s, "history": history.beside(s, earlier)} for s in summaries]


def _with_chart(gallery: Mapping[str, Any]) -> dict[str, Any]:
    """The gallery with the chart of the images per class and its colours."""
    by_series = gallery["data"]["counts"]
    labels = [label for label, values in by_series.items() if any(values)]
    names = gallery["data"]["classes"]
    chart = classes.draw(by_series, names, "classes")
    barred = len(names) <= classes.BARS  # a histogram has one colour and no legend
    added = {"chart": Markup(chart), "colours": canvas.series_colours(labels) if barred else {}}
    return {**gallery, "data": {**gallery["data"], **added}}


def escape_markdown(value: object) -> str:
    """A value as text that Markdown and HTML leave as it is, in one line, whole inside a table cell."""
    return MARKDOWN.sub(r"\\\1", " ".join(str(value).replace("&", "&amp;").split()))


def unbroken(text: str) -> str:
    """Text whose names (`ort-fp32`) and units stay on the line of what they belong to."""
    return re.sub(r"(?<=\d) (?=%|ms)", "\u00a0", text).replace("-", "\u2011")


def _fill(
    template: str,
    summaries: Sequence[Summary],
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
    environment.globals["against"] = wording.against
    environment.filters |= {"unbroken": unbroken, "thousands": "{:,}".format}
    return environment.get_template(template).render(
        runs=_distinct([_worded(s) for s in summaries]),
        gallery=gallery,
        several=len(summaries) > 1,
        unmeasured=wording.NONE,
    )


def _distinct(runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs; those of one machine have their title after its name."""
    names = [run["machine_name"] for run in runs]
    return [
        run | {"machine_name": f"{name} ({run['title']})" if names.count(name) > 1 else name}
        for run, name in zip(runs, names, strict=True)
    ]


def _worded(summary: Summary) -> dict[str, Any]:
    """A summary with the sentences made from several of its figures."""
    return {
        **summary,
        "machine_name": wording.machine_name(summary["machine"]),
        "headline": wording.headline(summary),
        "cards": wording.cards(summary),
        "baselines": list(
            dict.fromkeys(
                [*BASELINES, *(b for m in summary["models"].values() for b in m.get("against", {}))]
            )
        ),
        "family": summary.get("family"),
        "choice": wording.choice(summary),
        "cosines": wording.cosines(summary["models"]),
        "circumstances": wording.circumstances(summary["targets"]),
        "labels": wording.labels_in_words(summary["models"]),
        "deadline": wording.deadline(summary),
        "int8_rows": int8.int8_rows(summary),
        "left_in_float": int8.left_in_float(summary),
        "rows": [(t["target"], row) for t in summary["targets"] for row in wording.measured(t)],
        "forest_clocks": list(dict.fromkeys(wording.clock(pair) for pair in summary["pairs"])),
    }


def _charts(summary: Summary, name: str) -> dict[str, Any]:
    """The charts of one summary, with ids that begin with `name`, and the legend of the methods."""
    training, past = summary["training"], summary["history"]
    pairs, compared = (
        forest.of_pairs(summary["pairs"]),
        forest.of_comparisons(summary["comparisons"]),
    )
    charts = {
        "tradeoff": tradeoff.draw(summary, f"{name}-tradeoff"),
        "students": students.draw(summary, f"{name}-students"),
        "ecdf": ecdf.draw(summary, f"{name}-ecdf"),
        "pairs_forest": forest.draw(pairs, f"{name}-pairs", "student time / teacher time"),
        "baseline_forest": forest.draw(compared, f"{name}-baseline", "CPU time / baseline's"),
        "sizes": bars.draw(summary, "size_mb", f"{name}-sizes"),
        "memory": bars.draw(summary, "rss_mb", f"{name}-memory"),
        "layers": layers.draw(summary.get("int8", {}).get("layers", []), f"{name}-layers"),
        "past_p50": past and timeline.latencies(past, f"{name}-past-p50"),
        "past_top1": past and timeline.accuracies(past, f"{name}-past-top1"),
    }
    return {
        **{key: svg and Markup(svg) for key, svg in charts.items()},
        "curves": [(t, Markup(svg)) for t, svg in curves.draw_all(training, f"{name}-curve")],
        "lines": curves.keys(list(training)),
        "by_percentiles": [
            t["target"] for t in summary["targets"] if not sampled(t[m] for m in MODELS)
        ],
    }
