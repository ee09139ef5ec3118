"""Several students of one run in the report: their table, the chart, the front, and what the choice rests on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.browser import Browser, find
from pipeline.core import artifacts, config
from pipeline.core.students import MAIN, folder_of
from pipeline.report import page as report_page
from pipeline.report.family import family
from pipeline.report.page import markdown
from pipeline.report.summary import Report, Sources, summarise
from tests.house import ROOT
from tests.test_browser import CLIPPED, EMPTY, SMALLEST, VIEWS
from tests.test_report import ENABLED, HEAD, Run, run, score, stage  # noqa: F401 - the fixture
from tests.test_schemas import problems

BUDGETS = {"ort-fp32.wall_ms_max": 2.0, "top1_min": 0.7}
OVER = ["ort-fp32.wall_ms_max 2 (3.5 on ort-fp32)"]


def latency(name: str, p50: float | None) -> dict[str, Any]:
    """A row of students.json."""
    times = {"p50": p50, "p90": None, "p99": None, "n": 50 if p50 else 0}
    interval = None if p50 is None else [0.97 * p50, 1.04 * p50]
    return {
        "name": name,
        "model": "test_resnet",
        "kwargs": {},
        "params": 1000,
        "macs": 2000,
        "tap": None,
        "no_tap": None,
        "size_mb": 0.5,
        "status": "measured" if p50 else "skipped",
        "reason": None if p50 else "no device",
        "precision": "fp32" if p50 else None,
        "wall_ms": {**times, "p50_ci": interval},
        "flags": [],
    }


def with_students(run: Run) -> Path:  # noqa: F811
    """Make the run one of three students, of which `narrow` is exported; returns students.json."""
    judged = {"top1": 0.9, "nll": 0.3, "n": 100, "over_budget": []}
    selection = run.read("selection.json") | {
        "student": "narrow",
        "students": {
            MAIN: {**judged, "method": "cakd"},
            "narrow": {**judged, "method": "cakd"},
            "wide": {**judged, "method": "logits", "over_budget": OVER},
        },
    }
    run.write("selection.json", selection)
    brief = {"params": 5000, "macs": 9000}
    others = {
        name: {m: {"clean": score(t), "noisy": score(t - 0.1), **brief} for m, t in models.items()}
        for name, models in {
            MAIN: {"plain": 0.70, "logits": 0.80, "cakd": 0.84},
            "wide": {"plain": 0.85, "logits": 0.93, "cakd": 0.92},
        }.items()
    }
    run.write("accuracy.json", run.read("accuracy.json") | {"students": others})
    rows = [latency(MAIN, 0.9), latency("narrow", 0.6), latency("wide", 3.5)]
    targets = {"rtx-fp16": [latency(name, None) for name in (MAIN, "narrow", "wide")]}
    document = {"schema": "cakd.students/1", "targets": {**targets, "ort-fp32": rows}, **HEAD}
    run.write("students.json", document)
    return run.folder / "students.json"


def edge(run: Run) -> dict[str, Any]:  # noqa: F811
    """The summary of such a run."""
    names = ("accuracy.json", "selection.json", "train_perf.json", "build", "bench", "device.json")
    sources = Sources(*(run.folder / name for name in names), students=with_students(run))
    return summarise(sources, ENABLED, Report(budgets=BUDGETS))


def test_every_student_is_told_with_its_latency_and_the_front(run: Run) -> None:  # noqa: F811
    found = edge(run)
    assert found["student"] == "narrow" and found["family"]["target"] == "ort-fp32"
    rows = {(r["student"], r["method"]): r for r in found["family"]["rows"]}
    assert len(rows) == 3 + 4 + 3
    assert rows["narrow", "cakd"]["top1"] == found["models"]["cakd"]["clean"]["top1"]
    assert [key for key, row in rows.items() if row["exported"]] == [("narrow", "cakd")]
    assert {k[0] for k, r in rows.items() if r["selected"]} == {MAIN, "narrow", "wide"}
    front = {key for key, row in rows.items() if row["front"]}
    assert front == {("narrow", "cakd"), ("wide", "logits")}  # the middle one is slower and worse
    assert rows["wide", "logits"]["over_budget"] == OVER
    assert rows["wide", "plain"]["p50_ms"] == 3.5
    assert problems(json.loads(json.dumps(artifacts.rounded(found)))) == []


def test_a_run_of_one_student_has_no_family(run: Run) -> None:  # noqa: F811
    selection = run.read("selection.json")
    assert family(run.read("accuracy.json"), selection, {"targets": {}}) is None
    names = ("accuracy.json", "selection.json", "train_perf.json", "build", "bench", "device.json")
    found = summarise(Sources(*(run.folder / n for n in names)), ENABLED, Report())
    assert not {"student", "family"} & set(found)
    assert "## Students" not in markdown([found])


def test_the_pages_show_the_students(run: Run) -> None:  # noqa: F811
    students = with_students(run)
    done = stage(run, "--students", students)
    assert done.returncode == 0, done.stderr
    text = (run.folder / "out" / "edge.md").read_text()
    assert "| narrow | cakd |" in text and "wall\\_ms\\_max 2 (3.5 on ort-fp32)" in text
    html = (run.folder / "out" / "index.html").read_text()
    assert "Accuracy and latency of every student" in html and "narrow (exported)" in html
    assert problems(run.read("out/edge.json")) == []


def test_without_a_latency_there_is_a_table_and_no_chart(run: Run) -> None:  # noqa: F811
    students = with_students(run)
    run.write("students.json", {**run.read("students.json"), "targets": {}})
    done = stage(run, "--students", students)
    assert done.returncode == 0, done.stderr
    html = (run.folder / "out" / "index.html").read_text()
    assert "Accuracy and latency of every student" not in html and "<h2>Students" in html


def test_a_student_has_a_folder_of_its_own_and_the_main_one_has_not() -> None:
    root = Path("students")
    assert folder_of(root, MAIN) == root and folder_of(root, "wide") == root / "wide"


@pytest.mark.skipif(find() is None, reason="no chromium on PATH to open the page with")
@pytest.mark.parametrize("view", VIEWS)
def test_the_chart_is_whole_in_a_browser(view: str, run: Run) -> None:  # noqa: F811
    path = run.folder / "page.html"
    path.write_text(report_page.page([edge(run)]), encoding="utf-8")
    with Browser(str(find())) as browser:
        page = browser.open(path, **VIEWS[view])
        assert page.evaluate(f"{EMPTY}.length") == 0
        assert page.evaluate(CLIPPED) == []
        assert page.evaluate(SMALLEST) >= 9
        assert not page.requests and not page.errors


@pytest.mark.parametrize(
    ("students", "exported", "said"),
    [
        (
            {"coarse": {"student": "resnet18"}},
            "best",
            "distill.students.coarse: distill.student: got",
        ),
        (
            {"x": {"student": "resnet99"}},
            "best",
            "distill.students.x: distill.student: got 'resnet99'",
        ),
        ({"cakd": {"student": "resnet18"}}, "best", "got a student named 'cakd'"),
        ({"a/b": {"student": "resnet18"}}, "best", "distill.students: got the key 'a/b'; expected"),
        ({"v1.5": {"student": "resnet18"}}, "best", "distill.students: got the key 'v1.5'; exp"),
        ({}, "narrow", "export.student: got 'narrow', which is not in distill.students"),
    ],
)
def test_a_further_student_that_does_not_fit_is_named_before_any_training(
    students: dict[str, Any], exported: str, said: str, tmp_path: Path, command: Any
) -> None:
    params = config.read(ROOT / "params.yaml")
    params["distill"]["students"], params["export"]["student"] = students, exported
    path = tmp_path / "params.yaml"
    path.write_text(json.dumps(params))
    done = command("stages.check", "--params", path)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
