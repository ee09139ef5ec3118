"""int8 in the report: rows of quantize.json beside the latencies, layers as a chart; nothing without steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from pipeline.core.errors import UserError
from pipeline.report import int8, page, summary
from pipeline.report.charts import layers
from tests.test_charts import said
from tests.test_report import ENABLED, HEAD, Run, cells, run, stage  # noqa: F401 - the fixture

LAYERS = [
    {"name": "stem", "sqnr_db": 12.5, "floating": True},
    {"name": "head", "sqnr_db": 31.0, "floating": False},
]


def quantized(**changes: Any) -> dict[str, Any]:
    """A quantize.json of 200 steps: calibration loses 4 points, training half a point."""
    figures = {"runtime": "onnxruntime 1.32.0", "reason": None, "size_mb": 0.1}
    row = {"target": "ort-int8", "top1_agreement": 0.998, "sqnr_centered_db": 31.4, **figures}
    rows = [
        {**row, "ranges": "calibration", "top1": 0.86},
        {**row, "ranges": "training", "top1": 0.895},
    ]
    head = {"schema": "cakd.quantize/1", "steps": 200, "method": "cakd", **HEAD}
    return {**head, "images": 1000, "fp32_top1": 0.9, "rows": rows, "layers": LAYERS, **changes}


def summarised(run: Run, document: dict[str, Any]) -> dict[str, Any]:  # noqa: F811
    run.write("quantize.json", document)
    names = ("accuracy.json", "selection.json", "train_perf.json", "build", "bench", "device.json")
    paths = [run.folder / name for name in names]
    sources = summary.Sources(*paths, quantize=run.folder / "quantize.json")
    return summary.summarise(sources, ENABLED, summary.Report())


def test_both_reports_show_what_int8_loses_by_calibration_and_after_training(run: Run) -> None:  # noqa: F811
    edge = summarised(run, quantized())
    found = cells(page.markdown([edge]).split("## int8")[1], "ort-int8")
    assert found[:5] == ["ort-int8", "+4.0", "+0.5", "99.8", "31.4"]
    whole = page.page([edge])
    assert "by calibration" in whole and "200 steps of fine-tuning" in whole
    assert "Sensitivity of the layers" in whole
    (row,) = int8.int8_rows(edge)
    assert row["time"] is None or row["time"] > 0


RATIO = {"median": 1.08, "ci_low": 1.06, "ci_high": 1.1}


@pytest.mark.parametrize(
    ("nodes", "ratio", "words"),
    [
        (
            (["Conv_1"], ["Gemm_9"]),
            RATIO,
            "; the network takes 1.08 (1.06 to 1.10) of its CPU time with all layers in int8, in ONNX Runtime.",
        ),
        (
            (["Conv_1"], []),
            None,
            "; ONNX Runtime runs head in int8 all the same; what that costs was not measured: it died.",
        ),
        (([], []), None, "; ONNX Runtime runs all in int8 all the same."),
    ],
)
def test_both_reports_say_what_was_left_in_float_and_what_that_costs(
    run: Run,  # noqa: F811
    nodes: tuple[list[str], list[str]],
    ratio: dict[str, float] | None,
    words: str,
) -> None:
    layers = [{"name": n, "nodes": own} for n, own in zip(("stem", "head"), nodes, strict=True)]
    floating = {"layers": layers, "cpu_ratio": ratio, "reason": None if ratio else "it died"}
    edge = summarised(run, quantized(floating=floating))
    line = f"Left in float: stem, head (2 of 2 layers){words}"
    assert line == int8.left_in_float(edge)
    assert f" 200 steps of fine-tuning.\n\n{line}\n" in page.markdown([edge])
    whole = page.page([edge])
    assert line in whole and "The calibrated network has every node in int8" in whole


def test_with_nothing_in_float_the_report_says_nothing_of_it(run: Run) -> None:  # noqa: F811
    texts = []
    for changes in ({}, {"floating": {"layers": []}}):
        edge = summarised(run, quantized(**changes))
        texts.append((page.markdown([edge]), page.page([edge])))
        assert ("floating" in edge["int8"]) == bool(changes)
    assert texts[0] == texts[1]
    assert "eft in float" not in texts[0][0] and "Every node that can be is in int8." in texts[0][1]


def test_a_target_that_could_not_run_has_its_reason(run: Run) -> None:  # noqa: F811
    rows = quantized()["rows"]
    unrun = {"target": "rtx-int8", "top1": None, "top1_agreement": None, "reason": "no CUDA device"}
    rows += [{**row, **unrun, "sqnr_centered_db": None, "runtime": None} for row in rows]
    edge = summarised(run, quantized(rows=rows))
    assert "no CUDA device" in page.page([edge])
    assert cells(page.markdown([edge]), "rtx-int8")[1:3] == ["", ""]


def test_without_steps_the_report_is_as_before(run: Run, tmp_path: Path) -> None:  # noqa: F811
    assert stage(run).returncode == 0
    before = run.read("out/edge.json")
    run.write("quantize.json", quantized(steps=0, method=None, rows=[], layers=[]))
    assert stage(run, "--quantize", tmp_path / "quantize.json").returncode == 0
    assert run.read("out/edge.json") == before and "int8" not in before


def test_figures_without_the_accuracy_they_are_against_are_refused(run: Run) -> None:  # noqa: F811
    document = quantized()
    del document["fp32_top1"]
    with pytest.raises(UserError, match="steps: got 200 without images and fp32_top1"):
        summarised(run, document)


def test_the_most_sensitive_layers_come_first_and_are_named() -> None:
    many = [{"name": f"layer{i}", "sqnr_db": 50.0 - i, "floating": False} for i in range(40)]
    texts = said(layers.draw(many, "layers"))
    names = [text for text in texts if text.startswith("layer")]
    assert names == [f"layer{i}" for i in range(39, 39 - layers.MOST, -1)]
    assert layers.draw([], "layers") is None
