"""Reports that join a run with comparisons, pairs and intervals."""

from __future__ import annotations

import re

import pytest

from pipeline.report import adapters, machines
from pipeline.report import page as report_page
from pipeline.report.page import markdown
from tests import compared
from tests.compared import comparison, gate
from tests.test_report import OUT, Run, cells, command, run, stage, summary  # noqa: F401
from tests.test_schemas import problems

NEW = (
    "$.pairs",
    "$.comparisons",
    "$.verdict",
    "$.budgets",
)  # of the schema; the rest has its tests


def test_a_comparison_is_shown_with_its_gates_and_passes(run: Run) -> None:  # noqa: F811
    path = compared.against(run.folder, comparison(), comparison("ov-fp32", gates=[]))
    assert stage(run).returncode == 0
    done = command(["--merge", run.folder / OUT / "edge.json", path])
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 compared with the baseline: 2 PASS" in done.stdout
    told = done.stdout.split("## Baseline comparison")[1]
    row = next(r for r in told.splitlines() if r.startswith("| student.onnx | ort-fp32 |"))
    assert row.split(" | ")[2:] == ["1", r"1.00 \[0.970, 1.03\]", "1.10", "PASS |"]
    gates = r"| student.onnx | ort-fp32 | macs | 2,510,000 | 2,510,000 | 2,510,000 | PASS |"
    assert told.count(gates) == 1


@pytest.mark.parametrize(
    ("bad", "said"),
    [
        (comparison("ov-fp32", "FAIL", 1.3), "1.300 times the baseline's"),
        (comparison("ov-fp32", gates=[gate("opset", "FAIL", 21)]), "opset: baseline"),
    ],
)
def test_one_failed_comparison_ends_a_merge_with_exit_3(
    run: Run,  # noqa: F811
    bad: dict,
    said: str,
) -> None:
    path = compared.against(run.folder, comparison(), bad)
    done = command(["--merge", path, "--out", run.folder / "out"])
    assert done.returncode == 3 and said in done.stderr and done.stderr.count("\n") == 1
    assert (run.folder / "out" / "edge.md").read_text().startswith("**FAIL**")


def test_two_files_of_one_machine_are_told_apart(run: Run) -> None:  # noqa: F811
    path = compared.against(run.folder, comparison())
    run.write("other.json", run.read("against.json"))
    text = command(["--merge", path, run.folder / "other.json"]).stdout
    for title in ("against", "other"):
        assert f"## Baseline comparison on Example CPU 7, 2 of 4 cores ({title})" in text


def test_an_inconclusive_comparison_is_no_pass(run: Run) -> None:  # noqa: F811
    path = compared.against(run.folder, comparison(verdict="INCONCLUSIVE", median=1.1))
    done = command(["--merge", path])
    assert done.returncode == 0 and done.stdout.startswith("**INCONCLUSIVE**")


def test_a_comparison_alone_makes_a_page_without_empty_sections(run: Run) -> None:  # noqa: F811
    found = machines.read_machine(compared.against(run.folder, comparison()))
    page, text = report_page.page([found]), markdown([found])
    assert "<h2>Baseline comparison</h2>" in page and "<h2>Targets</h2>" not in page
    assert "## Targets" not in text and "## Budgets" not in text


def test_pairs_are_shown_by_target_with_their_clock(run: Run) -> None:  # noqa: F811
    compared.with_pairs(run)
    found = run.read("bench/ort-fp32.json")
    found["pairs"][0] |= {"clock": "engine", "batch": 8}
    run.write("bench/ort-fp32.json", found)
    edge = summary(run)
    text = markdown([edge]).split("## Student/teacher latency ratio")[1]
    row = [r"0.200 \[0.194, 0.206\]", "engine time on the GPU"]
    assert cells(text, "ort-fp32")[1:] == ["1", "8", *row]
    assert cells(text, "ov-default")[2:] == ["1", row[0], "CPU time"]
    page = report_page.page([edge])
    assert "<h3>Student/teacher latency ratio</h3>" in page and "ort-fp32, batch 8" in page


def test_files_without_pairs_show_no_empty_sections(run: Run) -> None:  # noqa: F811
    page = report_page.page([summary(run)])
    for heading in ("Student/teacher latency ratio", "Baseline comparison", "History"):
        assert heading not in page


def test_a_larger_batch_stands_beside_the_row_of_a_target(run: Run) -> None:  # noqa: F811
    found = run.read("bench/ort-fp32.json")
    larger = [{**row, "batch": 8} for row in found["rows"]]
    for row in larger[:1]:
        row["wall_ms"] = {**row["wall_ms"], "p50": 4.5678}
    run.write("bench/ort-fp32.json", {**found, "rows": [*larger, *found["rows"]]})
    target = summary(run)["targets"][1]
    assert (target["student"]["batch"], target["teacher"]["batch"]) == (1, 1)
    assert [(r["threads"], r["batch"]) for r in target["more_threads"]][:2] == [(1, 8), (1, 8)]
    assert "4.57" in report_page.page([summary(run)])


def test_comparisons_of_two_batches_are_told_apart(run: Run) -> None:  # noqa: F811
    both = [comparison("ort-fp32", "FAIL", 1.4, batch=1), comparison(median=0.9, batch=8)]
    path = compared.against(run.folder, *both)
    text = command(["--merge", path, "--out", run.folder / "out"])
    page = (run.folder / "out" / "edge.md").read_text()
    assert "| student.onnx | ort-fp32 | 1 | 1.40" in page
    assert "| student.onnx, batch 8 | ort-fp32 | 1 | 0.900" in page
    assert "student.onnx on ort-fp32, 1 thread: CPU time 1.400" in text.stderr
    summarised = machines.read_machine(path)
    found = [k for k in adapters.bencher(summarised) if "baseline" in k]
    assert found == [
        "student.onnx on ort-fp32, 1 thread, against its baseline",
        "student.onnx on ort-fp32, 1 thread, batch 8, against its baseline",
    ]


def test_two_files_that_are_one_model_are_refused(run: Run) -> None:  # noqa: F811
    found = run.read("bench/ort-fp32.json")
    again = {**found["rows"][0], "model": "student-v2.onnx"}
    first = {**found["rows"][0], "model": "student-v1.onnx"}
    run.write("two.json", {**found, "rows": [first, again]})
    done = command(["--merge", run.folder / "two.json"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert (
        "about 'student-v1.onnx' and 'student-v2.onnx', each the student in ort-fp32" in done.stderr
    )


def test_accuracies_of_val_are_not_called_those_of_test(run: Run) -> None:  # noqa: F811
    assert "split" not in summary(run)
    run.write("accuracy.json", {**run.read("accuracy.json"), "split": "val"})
    done = stage(run)
    assert done.returncode == 0, done.stderr
    for name in ("edge.md", "index.html"):
        page = (run.folder / OUT / name).read_text()
        assert "error of the val images" in page and "of the test images" not in page
        assert "Noisy: every val image" in page
    assert "accuracies are of the val images (evaluate.split), not of test" in page
    assert not problems(run.read(f"{OUT}/edge.json"))


def test_what_is_merged_and_what_is_written_keep_their_schema(run: Run) -> None:  # noqa: F811
    compared.with_pairs(run)
    crashed = comparison(verdict="FAIL", ratio=None, reason="candidate: killed", rounds=0)
    crashed["process_spread"] = {"candidate": None, "baseline": None}
    path = compared.against(run.folder, comparison(), crashed)
    for found in (machines.read_machine(path), summary(run, {"top1_min": 0.8})):
        assert not [p for p in problems(found) if p.startswith(NEW)]
    wrong = machines.read_machine(path)
    wrong["comparisons"][0]["ratio"].pop("tol")
    wrong["pairs"] = [{"target": "ort-fp32", "threads": 1}]
    assert len([p for p in problems(wrong) if p.startswith(NEW)]) == 2


def test_names_of_comparisons_cannot_leave_their_place(run: Run) -> None:  # noqa: F811
    evil = "x|y `z` <script>alert(1)</script>\n# $w$ [a](b)"
    bad = gate("macs", "FAIL", evil)
    path = compared.against(run.folder, comparison(model=evil, gates=[bad], target=evil))
    found = machines.read_machine(path)
    found["comparisons"][0]["gates"][0]["name"] = evil
    page, text = report_page.page([found]), markdown([found])
    assert "<script" not in page and "alert(1)" in page
    assert "script" in text and not re.search(r"(?<!\\)<", text)
    assert not [line for line in text.splitlines() if line.startswith("# ")]
