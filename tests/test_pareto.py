"""Points of accuracy and latency: their intervals, the front, the table for `dvc plots`."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline.report import pareto
from tests import compared
from tests.test_report import ROOT, TARGETS, Run, change_row, run, summary  # noqa: F401 - the fixture

TEMPLATE = ROOT / ".dvc" / "plots" / "pareto.json"


@pytest.mark.parametrize(
    ("share", "n", "low", "high"),
    [(0.5, 100, 0.4038, 0.5962), (0.99, 400, 0.9746, 0.9961), (1.0, 10, 0.7225, 1.0)],
)
def test_wilson_gives_the_score_interval(share: float, n: int, low: float, high: float) -> None:
    assert pareto.wilson(share, n) == pytest.approx((low, high), abs=1e-4)


def test_no_share_of_no_images_is_outside_its_interval() -> None:
    for n in (1, 7, 400):
        for right in range(n + 1):
            low, high = pareto.wilson(right / n, n)
            assert 0 <= low <= right / n <= high <= 1 and low < high


def test_points_are_the_measured_rows_fastest_first(run: Run) -> None:  # noqa: F811
    change_row(run, "ov-fp32", flags=["NOISY", "load"])
    found = pareto.points(summary(run))
    assert len(found) == 2 * len(TARGETS) - 2
    assert [p.p50 for p in found] == sorted(p.p50 for p in found)
    assert found[0].target == "ort-int8" and found[0].p50_ci == (found[0].p50, found[0].p50)
    assert {p.target for p in found if p.noisy} == {"ov-fp32"}
    assert {(p.target, p.model) for p in found if p.fell_back} == {("ov-int8", "student")}


def test_a_measured_interval_of_the_median_is_kept(run: Run) -> None:  # noqa: F811
    compared.with_pairs(run)
    for p in pareto.points(summary(run)):
        assert p.p50_ci == pytest.approx((0.9 * p.p50, 1.2 * p.p50))


def test_the_front_holds_what_nothing_faster_equals(run: Run) -> None:  # noqa: F811
    point = pareto.points(summary(run))[0]
    made = [replace(point, p50=ms, top1=top1) for ms, top1 in [(1, 90), (2, 90), (3, 95), (4, 94)]]
    assert [p.p50 for p in pareto.front(made)] == [1, 3]


def test_the_table_has_a_column_for_every_field_the_template_reads(run: Run) -> None:  # noqa: F811
    template = TEMPLATE.read_text()
    rows = list(csv.DictReader(pareto.table(pareto.points(summary(run))).splitlines()))
    assert len(rows) == 2 * len(TARGETS) - 2 and tuple(rows[0]) == pareto.COLUMNS
    assert float(rows[0]["top1_low_percent"]) < float(rows[0]["top1_percent"]) == 88.5
    fields = [f for f in fields_of(json.loads(template)) if not f.startswith("<")]
    assert len(fields) > 5 and set(fields) <= {*pareto.COLUMNS, "rev"}
    parsed = json.loads(template)["data"]["format"]["parse"]
    assert set(parsed) == {c for c in pareto.COLUMNS if c.endswith(("_ms", "_percent"))}


def fields_of(part: object) -> list[str]:
    """Every `field` of a Vega-Lite specification."""
    if isinstance(part, dict):
        own = [part["field"]] if isinstance(part.get("field"), str) else []
        return own + [f for value in part.values() for f in fields_of(value)]
    return [f for value in part for f in fields_of(value)] if isinstance(part, list) else []


def test_dvc_fills_the_template(run: Run, tmp_path: Path) -> None:  # noqa: F811
    """In a repository of its own; DVC has the last word on what its anchors are."""
    repository = tmp_path / "repository"
    (repository / ".dvc" / "plots").mkdir(parents=True)
    (repository / ".dvc" / "config").write_text(
        "[core]\n    no_scm = true\n    analytics = false\n"
    )
    (repository / ".dvc" / "plots" / TEMPLATE.name).write_text(TEMPLATE.read_text())
    (repository / "pareto.csv").write_text(pareto.table(pareto.points(summary(run))))
    options = ["-t", "pareto", "-x", "p50_ms", "-y", "top1_percent", "--show-vega"]
    line = [sys.executable, "-m", "dvc", "plots", "show", "pareto.csv", *options]
    environment = {**os.environ, "DVC_NO_ANALYTICS": "1"}
    done = subprocess.run(line, cwd=repository, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    shown = json.loads(done.stdout)
    assert len(shown["data"]["values"]) == 2 * len(TARGETS) - 2
    assert "<DVC_METRIC" not in done.stdout
    assert shown["layer"][2]["encoding"]["x"]["field"] == "p50_ms"
