"""Gates and what they come to. The verdicts of whole runs are in test_report."""

from __future__ import annotations

import pytest

from pipeline.report import verdict
from tests.compared import comparison, gate
from tests.test_report import ENABLED, Run, run, summary  # noqa: F401 - the fixture

EMPTY = {"models": {}, "shipped": None, "targets": [], "parity": [], "budgets": []}


@pytest.mark.parametrize(
    ("comparisons", "status"),
    [
        ([comparison()], "PASS"),
        ([comparison(), comparison(verdict="INCONCLUSIVE", median=1.1)], "INCONCLUSIVE"),
        ([comparison(verdict="INCONCLUSIVE", ratio=None, gates=[])], "INCONCLUSIVE"),
        ([comparison(verdict="INCONCLUSIVE"), comparison(verdict="FAIL", median=1.3)], "FAIL"),
        ([comparison(gates=[gate(verdict="FAIL")])], "FAIL"),
        ([comparison(gates=[gate(verdict="ALLOWED")])], "PASS"),
        ([comparison(gates=[gate(verdict="UNKNOWN")])], "PASS"),
        ([], "NOT JUDGED"),
    ],
)
def test_the_worst_comparison_is_the_status(comparisons: list, status: str) -> None:
    found = verdict.judge({**EMPTY, "comparisons": comparisons})
    assert found["status"] == status and bool(found["failures"]) == (status == "FAIL")


def test_a_failed_comparison_says_where_by_how_much_and_what_is_tolerated() -> None:
    found = verdict.judge({**EMPTY, "comparisons": [comparison(verdict="FAIL", median=1.3)]})
    assert found["failures"] == [
        "student.onnx on ort-fp32, 1 thread: CPU time 1.300 times the baseline's, "
        "95 % interval 1.261 to 1.339, tolerated 1.1"
    ]


def test_a_failed_gate_is_not_blamed_on_the_latency() -> None:
    failed = comparison(verdict="FAIL", gates=[gate("opset", "FAIL", 21)])
    found = verdict.judge({**EMPTY, "comparisons": [failed]})
    (said,) = found["failures"]
    assert said.endswith("opset: baseline 2510000, candidate 21, limit 2510000")
    slower = comparison(verdict="FAIL", median=1.3, gates=[gate("opset", "FAIL", 21)])
    assert len(verdict.judge({**EMPTY, "comparisons": [slower]})["failures"]) == 2


def test_a_side_that_did_not_run_is_told() -> None:
    crashed = comparison(verdict="INCONCLUSIVE", ratio=None, reason="baseline: killed by SIGSEGV")
    found = verdict.judge({**EMPTY, "comparisons": [crashed]})
    assert any("baseline: killed by SIGSEGV" in note for note in found["notes"])
    died = comparison(verdict="FAIL", ratio=None, reason="candidate: killed by SIGSEGV", gates=[])
    found = verdict.judge({**EMPTY, "comparisons": [died]})
    assert found["failures"] == ["student.onnx on ort-fp32, 1 thread: candidate: killed by SIGSEGV"]


def test_every_target_that_asks_for_a_precision_has_a_gate_of_it(run: Run) -> None:  # noqa: F811
    gates = {g.name: g for g in verdict.gates(summary(run)) if g.kind == "precision"}
    assert set(gates) == {*ENABLED} - {"ov-default"}
    assert gates["ov-int8"].verdict == "FELL BACK" and "top-1 falls" in gates["ov-int8"].message
    assert gates["trt-fp16"].verdict == "NOT MEASURED" and gates["ort-int8"].verdict == "PASS"
    assert not any(g.failed for g in gates.values())
