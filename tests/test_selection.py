"""The exported student is chosen on val: which one, by what order, and that nothing else was looked at."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from pipeline.data.pixels import Squares
from pipeline.data.prepared import Prepared
from pipeline.evaluate import selection
from tests.test_schemas import problems
from tests.test_training import QUICK, run

METHODS = ("plain", "logits")


def figures(top1: float, nll: float) -> dict[str, float]:
    return {"top1": top1, "nll": nll, "n": 100}


@pytest.mark.parametrize(
    ("judged", "selected", "reason"),
    [
        (((0.7, 0.9), (0.8, 2.0), (0.75, 0.1)), "b", "best top-1 on val, 80.0 % of 100 images"),
        (((0.8, 0.9), (0.8, 0.5), (0.7, 0.1)), "b", "as a; chosen by lower NLL"),
        (((0.8, 0.6), (0.8, 0.5), (0.8, 0.5)), "b", "as a, c; chosen by lower NLL or its place in"),
        (((0.8, 0.5), (0.8, 0.5), (0.8, 0.5)), "a", "as b, c; chosen by lower NLL or its place in"),
    ],
)
def test_the_best_on_val_is_selected_then_the_lower_nll_then_the_earlier(judged, selected, reason):
    named = {name: figures(*values) for name, values in zip("abc", judged, strict=True)}
    found = selection.choose(named)
    assert found[0] == selected and reason in found[1]


def test_a_method_that_is_named_stays_and_the_best_is_told():
    judged = {"plain": figures(0.7, 1), "cakd": figures(0.8, 1)}
    assert selection.choose(judged, "cakd") == (
        "cakd",
        "export.method names it; which is the best top-1 on val, 80.0 % of 100 images",
    )
    named, reason = selection.choose(judged, "plain")
    assert named == "plain" and "70.0 % top-1 on val, where cakd is the best with" in reason


class OnlyVal(np.ndarray):
    """Pixels that give the rows of val and refuse every other."""

    allowed: set[int]

    def __getitem__(self, key):
        rows = np.arange(len(self))[key]
        assert set(np.ravel(rows).tolist()) <= self.allowed, "rows that are not of val"
        return np.asarray(self)[key]


@pytest.fixture
def students(prepared, teacher_path, features, tmp_path):
    for method in METHODS:
        run(QUICK, method, prepared, teacher_path, features, tmp_path / "students")
    return tmp_path / "students"


def test_the_stage_opens_no_split_but_val(students, digits, command, tmp_path, monkeypatch):
    opened = Prepared.open(digits)
    val = set(opened.rows("val").tolist())
    rows, asked = Prepared.rows, []

    def watched(self, split):
        asked.append(split)
        assert split == "val", f"the {split} split was opened"
        return rows(self, split)

    def guarded(folder):
        pixels = np.asarray(opened.images.array).view(OnlyVal)
        pixels.allowed = val
        return Prepared(**{**vars(opened), "images": Squares(pixels)})

    monkeypatch.setattr(Prepared, "rows", watched)
    monkeypatch.setattr(Prepared, "open", guarded)
    with pytest.raises(AssertionError, match="not of val"):
        guarded(digits).images.squares(rows(opened, "test"))
    params, out = tmp_path / "params.yaml", tmp_path / "selection.json"
    params.write_text(
        "distill: {methods: [plain, logits]}\nexport: {method: best}\nevaluate: {crop_pct: 1.0}\n"
    )
    done = command("stages.select", digits, students, out, "--params", params)
    assert done.returncode == 0, done.stderr
    assert set(asked) == {"val"} and done.stdout.count("\n") == 1
    document = json.loads(out.read_text())
    assert problems(document) == []
    assert document["selected"] == selection.choose(document["methods"])[0]
    assert [f["n"] for f in document["methods"].values()] == [100, 100]
    assert document["split"] == "val" and set(document["provenance"]["inputs"]) == set(METHODS)


ROWS = {
    "ort-int8": [
        {"name": "student", "wall_ms": {"p50": 1.0}, "size_mb": 2.0, "params": 100},
        {"name": "wide", "wall_ms": {"p50": 5.0}, "size_mb": 8.0, "params": 400},
    ],
    "ov-fp32": [
        {"name": "student", "wall_ms": {"p50": 2.0}, "size_mb": 3.0, "params": 100},
        {"name": "wide", "wall_ms": {"p50": None}, "size_mb": None, "params": 400},
    ],
}


@pytest.mark.parametrize(
    ("budgets", "broken"),
    [
        ({}, []),
        ({"wall_ms_max": 5.0, "top1_min": 0.9}, []),
        ({"wall_ms_max": 4.0}, ["wall_ms_max 4 (5 on ort-int8)"]),
        ({"ov-fp32.wall_ms_max": 0.1}, []),  # not measured there
        ({"ort-int8.size_mb_max": 7.0, "params_max": 300}, 2),
    ],
)
def test_a_student_is_over_a_budget_that_its_best_measured_target_breaks(
    budgets: dict[str, float], broken: Any
) -> None:
    found = selection.over_budget("wide", ROWS, budgets)
    assert found == broken or len(found) == broken


def test_the_best_student_within_the_budgets_is_chosen_and_the_reason_names_the_others() -> None:
    best = {"student": {"top1": 0.8, "nll": 1.0}, "wide": {"top1": 0.9, "nll": 1.0}}
    fits: dict[str, list[str]] = {"student": [], "wide": []}
    assert selection.choose_student(best, fits)[0] == "wide"
    over = {**fits, "wide": ["wall_ms_max 4 (5 on ort-int8)"]}
    chosen, reason = selection.choose_student(best, over)
    assert chosen == "student" and reason.endswith("over a budget: wide")
    chosen, reason = selection.choose_student(best, {**over, "student": ["size_mb_max 1 (2 on x)"]})
    assert chosen == "wide" and "none keeps the budgets: wall_ms_max 4" in reason
    assert selection.choose_student(best, over, "wide")[0] == "wide"
