"""A summary for other services: valid in their formats, true to the verdict, names kept in their place."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft7Validator

from pipeline.report import adapters
from tests import compared
from tests.test_report import OUT, Run, command, run, stage, summary  # noqa: F401

BMF = {  # what bencher.dev/docs/reference/bencher-metric-format asks for
    "type": "object",
    "additionalProperties": {
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": "object",
            "required": ["value"],
            "properties": {k: {"type": "number"} for k in ("value", "lower_value", "upper_value")},
            "additionalProperties": False,
        },
    },
}


def edge(run: Run, **budgets: float) -> dict[str, Any]:  # noqa: F811
    """A summary with everything that an adapter reads."""
    compared.with_pairs(run)
    return {**summary(run, budgets), "comparisons": [compared.comparison()]}


def test_github_action_benchmark_gets_figures_of_which_less_is_better(run: Run) -> None:  # noqa: F811
    found = adapters.github_action_benchmark(edge(run))
    names = [entry["name"] for entry in found]
    assert len(names) == len(set(names))
    by_name = {entry["name"]: entry for entry in found}
    latency = by_name["student on ort-fp32, 1 thread: latency p50"]
    assert latency["unit"] == "ms" and " to " in latency["range"]
    assert latency["extra"] == "fp32 on ort-fp32, Example CPU 7"
    error = by_name["cakd: clean top-1 error"]
    assert (error["value"], error["unit"], error["range"]) == (11.5, "%", "8.73 to 15.00")
    ratio = by_name["student.onnx on ort-fp32, 1 thread: CPU time over the baseline's"]
    assert ratio["value"] == 1.0
    for entry in found:
        assert entry.keys() - {"range"} == {"name", "unit", "value", "extra"}
        assert isinstance(entry["value"], int | float) and isinstance(entry["name"], str)


def test_bencher_gets_nanoseconds_bytes_and_intervals(run: Run) -> None:  # noqa: F811
    whole = edge(run)
    found = adapters.bencher(whole)
    Draft7Validator(BMF).validate(found)
    row = whole["targets"][1]["student"]
    measures = found["student on ort-fp32, 1 thread"]
    p50 = row["wall_ms"]["p50"]
    assert measures["latency"]["value"] == pytest.approx(1e6 * p50)
    assert measures["latency"]["lower_value"] == pytest.approx(0.9e6 * p50)
    assert measures["throughput"]["value"] == pytest.approx(1e3 / p50)
    assert measures["file-size"] == {"value": 6.1e6}
    assert found["cakd"]["top-1"]["value"] == 0.885
    for block in found.values():
        for metric in block.values():
            low, high = metric.get("lower_value", 0), metric.get("upper_value", float("inf"))
            assert low <= metric["value"] <= high


def cases(text: str) -> dict[str, ET.Element]:
    """Name -> test case of a JUnit file, whose counts must be true."""
    root = ET.fromstring(text)
    for suite in root:
        for tag in ("failure", "skipped"):
            counted = suite.get("failures" if tag == "failure" else tag)
            assert counted == str(len(suite.findall(f"testcase/{tag}")))
        assert suite.get("tests") == str(len(suite)) and suite.get("errors") == "0"
    return {str(case.get("name")): case for case in root.iter("testcase")}


def test_junit_has_a_case_a_gate(run: Run) -> None:  # noqa: F811
    limits = {"top1_min": 0.95, "params_max": 2e6, "trt-fp16.wall_ms_max": 1.0}
    found = cases(adapters.junit(edge(run, **limits)))
    assert found["top1_min"][0].tag == "failure"
    assert found["top1_min"][0].get("message") == "budget top1_min: got 0.885, limit 0.95"
    assert len(found["params_max"]) == 0
    assert found["trt-fp16.wall_ms_max"][0].tag == "skipped"
    assert str(found["ov-int8"][0].get("message")).startswith("FELL BACK: fell back to fp32")
    assert len(found["ort-fp32 student.onnx"]) == 0
    assert len(found["student.onnx on ort-fp32, 1 thread: latency"]) == 0
    assert {c.get("classname") for c in found.values()} == {
        *("parity", "budget", "precision", "baseline")
    }


@pytest.mark.parametrize(
    ("verdict", "median", "tag"), [("FAIL", 1.3, "failure"), ("INCONCLUSIVE", 1.1, "skipped")]
)
def test_junit_tells_the_verdict_on_the_latency(verdict: str, median: float, tag: str) -> None:
    made = {"title": "t", "targets": [], "parity": [], "budgets": []}
    found = cases(
        adapters.junit({**made, "comparisons": [compared.comparison("ov-fp32", verdict, median)]})
    )
    assert found["student.onnx on ov-fp32, 1 thread: latency"][0].tag == tag


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_junit_fails_what_the_report_fails(run: Run, precision: str) -> None:  # noqa: F811
    rows = run.read("build/ort-fp32/parity.json")
    rows["rows"][0] |= {"precision_effective": precision, "verdict": "FAIL", "reason": "7e-2"}
    run.write("build/ort-fp32/parity.json", rows)
    whole = edge(run)
    failed = [c for c in cases(adapters.junit(whole)).values() if c.find("failure") is not None]
    assert len(failed) == len(whole["verdict"]["failures"]) == (precision == "fp32")


def test_no_name_leaves_its_place(run: Run) -> None:  # noqa: F811
    evil = 'x" /><failure message="</testsuite>&\x00\x1b\ud800'
    whole = edge(run)
    whole["targets"][1]["student"] |= {"status": "skipped", "reason": evil}
    whole["title"] = whole["targets"][2]["target"] = evil
    whole["models"][evil] = whole["models"]["cakd"]
    whole["comparisons"] = [compared.comparison(model=evil, verdict="FAIL", median=1.3)]
    found = cases(adapters.junit(whole))
    assert sum(c.find("failure") is not None for c in found.values()) == 1
    for name in ("bencher", "github-action-benchmark"):
        json.loads(adapters.FORMATS[name](whole))


@pytest.mark.parametrize("name", adapters.FORMATS)
def test_the_command_writes_each_format(run: Run, name: str) -> None:  # noqa: F811
    run.params({"top1_min": 0.95})
    assert stage(run).returncode == 3
    edge_json, out = run.folder / OUT / "edge.json", run.folder / "there" / "file"
    done = command(["--from", edge_json, "--as", name, "--out", out])
    assert (done.returncode, done.stderr) == (0, "")
    printed = command(["--from", edge_json, "--as", name])
    assert printed.stdout == out.read_text(encoding="utf-8")


def test_the_command_reads_a_comparison_and_refuses_an_unknown_format(tmp_path: Path) -> None:
    path = compared.against(tmp_path, compared.comparison(verdict="FAIL", median=1.3))
    done = command(["--from", path, "--as", "junit"])
    assert done.returncode == 0 and done.stdout.count("<failure") == 1
    done = command(["--from", path, "--as", "xunit"])
    assert done.returncode == 2 and "junit" in done.stderr
