"""The report's pictures: what is in them, that labels stay apart, that colours and names come from the page."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from itertools import pairwise
from typing import Any

import pytest

from pipeline.report import history
from pipeline.report.charts import bars, canvas, curves, ecdf, forest, timeline, tradeoff
from tests import compared
from tests.test_report import TARGETS, Run, change_row, run, summary  # noqa: F401 - the fixture

BUDGETS = {"top1_min": 0.8, "ort-fp32.wall_ms_max": 1.0, "wall_ms_max": 2.0, "size_mb_max": 4.0}


def drawn(run: Run) -> dict[str, str]:  # noqa: F811
    """Every picture of a run that has everything, by name."""
    compared.with_pairs(run)
    edge = summary(run, BUDGETS)
    past = history.beside(edge, compared.past(edge))
    assert past
    pairs = forest.of_pairs(edge["pairs"])
    heads = forest.of_comparisons([compared.comparison(), compared.comparison("ov-fp32")])
    found = {
        "tradeoff": tradeoff.draw(edge),
        "ecdf": ecdf.draw(edge),
        "pairs": forest.draw(pairs, "pairs", "student time / teacher time"),
        "baseline": forest.draw(heads, "baseline", "CPU time / baseline's"),
        "size": bars.draw(edge, "size_mb", "size"),
        "memory": bars.draw(edge, "rss_mb", "memory"),
        "latencies": timeline.latencies(past, "latencies"),
        "accuracies": timeline.accuracies(past, "accuracies"),
        **dict(curves.draw_all(edge["training"])),
    }
    assert all(found.values())
    return {name: str(picture) for name, picture in found.items()}


def said(picture: str | None) -> list[str]:
    """Every text in a picture."""
    assert picture
    return re.findall(r">([^<>\n]+)</text>", picture)


def test_pictures_take_every_colour_from_the_page_and_say_what_they_show(run: Run) -> None:  # noqa: F811
    pictures = drawn(run)
    assert {"cross_entropy", "kl", "discriminator_accuracy"} < set(pictures)
    assert "fraction" in said(pictures["discriminator_accuracy"])
    for name, picture in pictures.items():
        label = re.match(r'<svg[^>]* role="img" aria-label="([^"]{10,})"', picture)
        assert label, name
        assert not re.findall(r"(?:fill|stroke): ?#", picture), name
        assert "var(--ink)" in picture, name
        ET.fromstring(picture.replace("xlink:", ""))


def test_methods_differ_by_line_as_well_as_by_colour() -> None:
    keys = curves.keys([f"method {i}" for i in range(6)])
    assert len({k[1:] for k in keys}) == 6 and len({dashes for _, _, dashes in keys}) == 4


def test_labels_of_the_tradeoff_stay_apart_and_inside(run: Run) -> None:  # noqa: F811
    for target in TARGETS:  # the worst case: all targets equally fast
        wall = {"p50": 1.0, "p90": None, "p99": None, "min": 1.0, "n": 90, "p50_ci": None}
        change_row(run, target, wall_ms=wall)
    picture = tradeoff.draw(summary(run))
    assert picture
    place = r'(?:translate\(([\d.]+) ([\d.]+)\)|x="([\d.]+)" y="([\d.]+)")'
    found = [
        [g for g in t if g] for t in re.findall(rf"{place}[^>]*>([a-z]+-[^<]+)</text>", picture)
    ]
    labels = [(float(x), float(y), text) for x, y, text in found]
    assert len(labels) == 2 * len(TARGETS) - 2  # no teacher in int8
    heights = sorted(y for _, y, _ in labels)
    assert min(b - a for a, b in pairwise(heights)) > 10
    assert all(x + canvas.LETTER * len(t) <= canvas.WIDTH for x, _, t in labels)


def test_the_tradeoff_tells_intervals_and_budgets_in_words(run: Run) -> None:  # noqa: F811
    words = said(tradeoff.draw(summary(run, BUDGETS)))
    assert "student cakd: 88.5 % [85.0, 91.3]" in words
    assert "teacher: 97.2 % [95.1, 98.5]" in words
    limits = {"budget ort-fp32 ≤ 1 ms", "budget ≤ 2 ms", "budget ≥ 80 %"}
    assert limits <= set(words)
    assert not [w for w in said(tradeoff.draw(summary(run))) if "budget" in w]


def test_an_interval_of_the_latency_is_drawn_where_it_was_measured(run: Run) -> None:  # noqa: F811
    before = tradeoff.draw(summary(run))
    compared.with_pairs(run)
    after = tradeoff.draw(summary(run))
    assert before and after and after.count("<path") > before.count("<path")


def test_a_noisy_row_is_named_in_every_picture_of_latencies(run: Run) -> None:  # noqa: F811
    change_row(run, "ort-fp32", flags=["NOISY", "load"])
    edge = summary(run)
    assert any(w.startswith("ort-fp32 NOISY") for w in said(tradeoff.draw(edge)))
    assert "ort-fp32 NOISY" in said(ecdf.draw(edge))


def test_a_student_alone_is_drawn_too(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    for target in edge["targets"]:
        target["teacher"]["status"] = "skipped"
    words = said(tradeoff.draw(edge))
    assert not [w for w in words if w.startswith("teacher")]
    assert any(w.startswith("torch-eager") for w in words)


def test_nothing_measured_draws_nothing(run: Run) -> None:  # noqa: F811
    edge = summary(run)
    for target in edge["targets"]:
        for model in ("student", "teacher"):
            target[model] |= {"status": "skipped", "samples_ms": [], "size_mb": None}
            target[model]["rss_mb"] = None
    assert tradeoff.draw(edge) is None and ecdf.draw(edge) is None
    assert bars.draw(edge, "size_mb", "s") is None and bars.draw(edge, "rss_mb", "m") is None
    assert forest.draw([], "f", "ratio") is None


@pytest.mark.parametrize(("low", "high", "ticks"), [(0.12, 1.2, "0.5"), (0.97, 1.1, "1.05")])
def test_ratios_far_apart_stand_on_a_log_axis(low: float, high: float, ticks: str) -> None:
    rows = [forest.Row("a", low, low, low), forest.Row("b", high, high, high)]
    assert ticks in said(forest.draw(rows, "f", "ratio"))


def test_a_comparison_carries_its_verdict_and_its_tolerance() -> None:
    found = [compared.comparison("ort-fp32", "FAIL", 1.2), compared.comparison("ov-int8")]
    rows = forest.of_comparisons(found)
    assert [(r.name, r.tol, r.verdict) for r in rows] == [
        ("ort-fp32", 0.1, "FAIL"),
        ("ov-int8", 0.1, "PASS"),
    ]
    words = said(forest.draw(rows, "f", "ratio"))
    assert "1.20 [1.16, 1.24] FAIL" in words and "1.00 [0.970, 1.03] PASS" in words


def test_several_models_are_named_and_one_without_a_ratio_is_left_out() -> None:
    other = compared.comparison(model="teacher.onnx", threads=2)
    crashed = compared.comparison(verdict="INCONCLUSIVE", ratio=None)
    rows = forest.of_comparisons([compared.comparison(), other, crashed])
    assert [r.name for r in rows] == ["student.onnx ort-fp32", "teacher.onnx ort-fp32, 2 threads"]


def test_names_cannot_leave_a_picture(run: Run) -> None:  # noqa: F811
    evil = "<script>&\"'$x$"
    edge = summary(run, BUDGETS)
    edge["targets"][0]["target"] = evil
    edge["shipped"] = evil
    edge["models"][evil] = edge["models"]["cakd"]
    past = history.beside(edge, compared.past(edge))
    assert past
    past["runs"][0]["name"] = evil
    rows = [forest.Row(evil, 1.0, 0.9, 1.1)]
    pictures: list[Any] = [
        tradeoff.draw(edge),
        ecdf.draw(edge),
        bars.draw(edge, "size_mb", "s"),
        timeline.latencies(past, "l"),
        timeline.accuracies(past, "a"),
        forest.draw(rows, "f", evil),
    ]
    for picture in pictures:
        assert "<script" not in picture and "script" in picture
        ET.fromstring(picture.replace("xlink:", ""))
