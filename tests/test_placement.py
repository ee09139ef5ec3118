"""Which operators ran where: counted by ONNX Runtime's profile and OpenVINO's graph, or why not."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.artifact.placement import Node, placement
from exporters.bench import worker
from exporters.ort import quantize
from exporters.ort.session import OrtSession
from exporters.ov import convert
from exporters.ov.session import OvSession
from pipeline.report import page as report_page
from pipeline.report.page import markdown
from tests.test_bench import PLAYER, player, rows_of, subject  # noqa: F401 - the fixture
from tests.test_report import (
    Run,
    cells,
    change_row,
    run,  # noqa: F401 - the fixture
    summary,
)
from tests.test_schemas import problems


def counted(told: dict[str, Any], *precisions: str) -> Counter[str]:
    """Operators of the groups of these precisions."""
    assert told["reason"] is None and told["source"]
    groups = [g["operators"] for g in told["groups"] if g["precision"] in precisions]
    return sum(map(Counter, groups), Counter())


def test_groups_are_of_a_place_and_precision_the_largest_first() -> None:
    nodes = [
        *[Node("GPU", "Conv", "int8")] * 2,
        Node("GPU", "Relu", "int8"),
        *[Node("CPU", "Conv", "fp32")] * 2,
        Node("CPU", "Shape", None),
        Node("CPU", "Cast", "fp32"),
    ]
    told = placement("a test", reversed(nodes))
    assert [(g["location"], g["precision"], g["operators"]) for g in told["groups"]] == [
        ("GPU", "int8", {"Conv": 2, "Relu": 1}),
        ("CPU", "fp32", {"Conv": 2}),
        ("CPU", "conversion", {"Cast": 1}),
        ("CPU", "other", {"Shape": 1}),
    ]


def test_onnx_runtime_runs_every_convolution_of_an_fp32_network_in_fp32(exported: Path) -> None:
    told = OrtSession(exported / "student.onnx", 1).placement()
    written = Counter(n.op_type for n in onnx.load(exported / "student.onnx").graph.node)
    assert counted(told, "fp32")["Conv"] == written["Conv"]
    assert counted(told, "int8") == Counter()
    assert {group["location"] for group in told["groups"]} == {"CPUExecutionProvider"}


def test_a_convolution_left_in_float_is_seen_in_an_int8_network(
    exported: Path, tmp_path: Path
) -> None:
    model, x = onnx.load(exported / "student.onnx"), np.load(exported / "calibration.npy")
    convolutions = [node.name for node in model.graph.node if node.op_type == "Conv"]
    with quantize.Calibrated(model, x) as network:
        for name, floating in (("all", []), ("but-first", convolutions[:1])):
            onnx.save(network.quantized(floating), tmp_path / f"{name}.onnx")
    whole, mixed = (OrtSession(tmp_path / f"{n}.onnx", 1).placement() for n in ("all", "but-first"))
    assert counted(whole, "int8")["QLinearConv"] == len(convolutions)
    assert counted(whole, "fp32")["Conv"] == 0
    assert counted(mixed, "int8")["QLinearConv"] == len(convolutions) - 1
    assert counted(mixed, "fp32")["Conv"] == 1


def test_the_precision_of_a_row_and_its_placement_are_of_one_profile(
    exported: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = OrtSession(exported / "student.onnx", 1)
    opened = []
    real = session._open
    monkeypatch.setattr(session, "_open", lambda *a: opened.append(a) or real(*a))
    assert session.precision_effective == "fp32" and session.placement()["groups"]
    assert len(opened) == 1


def test_openvino_counts_what_its_graph_executes(exported: Path, tmp_path: Path) -> None:
    pytest.importorskip("openvino")
    convert.write_ir(exported / "student.onnx", tmp_path / "student.xml")
    written = Counter(n.op_type for n in onnx.load(exported / "student.onnx").graph.node)
    told = OvSession(tmp_path / "student.xml", 1, "fp32").placement()
    assert counted(told, "fp32")["Convolution"] == written["Conv"]
    assert not {"Const", "Input", "Output"} & counted(told, "fp32", "other").keys()
    assert {group["location"] for group in told["groups"]} <= {"CPU", "CPU, reference kernel"}


def test_a_row_of_the_bench_says_it_and_a_runtime_that_cannot_says_why(
    player: None,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    methods = """
    def placement(self):
        if "placed" not in self.play:
            raise RuntimeError("no such table")
        return {"source": "a test", "groups": [], "reason": None}

    def run("""
    script = tmp_path / "placed.py"
    script.write_text(PLAYER.replace("\n    def run(", methods))
    silent, gone = rows_of([subject(tmp_path, ""), subject(tmp_path, "unavailable")])
    assert gone["placed_on"] is None
    assert silent["placed_on"] == {
        "source": None,
        "groups": [],
        "reason": "player 1.0 lists no operators",
    }
    monkeypatch.setattr(worker, "COMMAND", (sys.executable, str(script)))
    told, failed = rows_of([subject(tmp_path, "placed"), subject(tmp_path, "")])
    assert told["placed_on"] == {"source": "a test", "groups": [], "reason": None}
    assert failed["placed_on"]["reason"] == "RuntimeError: no such table"
    assert (failed["status"], failed["precision_effective"]) == ("measured", "bf16")


def test_the_report_shows_nodes_by_place_and_precision_or_the_reason(run: Run) -> None:  # noqa: F811
    before = problems(summary(run))
    groups = [
        {
            "location": "CPUExecutionProvider",
            "precision": "conversion",
            "operators": {"Cast": 1200},
        },
        {"location": "CPUExecutionProvider", "precision": "fp32", "operators": {"A": 2, "B": 1}},
        {"location": "<b>GPU</b>", "precision": "int8", "operators": {"Conv": 9}},
    ]
    change_row(run, "ort-fp32", placed_on={"source": "a test", "groups": groups, "reason": None})
    reason = "torch 2.15 eager lists no operators"
    change_row(run, "torch-eager", placed_on={"source": None, "groups": [], "reason": reason})
    edge = summary(run)
    assert problems(edge) == before
    text = markdown([edge]).partition("## Tail latency")[2]
    told = r"CPUExecutionProvider: 1,200 conversions, 3 fp32; \<b\>GPU\</b\>: 9 int8"
    assert cells(text, "ort-fp32")[-1] == told
    assert cells(text, "torch-eager")[-1] == f"n/a: {reason}"
    assert cells(text, "ov-fp32")[-1] == "n/a: not in this file"
    assert '<td class="t">CPUExecutionProvider: 1,200 conversions, 3 fp32; &lt;b&gt;GPU' in (
        report_page.page([edge])
    )
    edge["targets"][1]["student"]["placed_on"]["groups"][0]["precision"] = "fp8"
    assert len(problems(edge)) > len(before)
