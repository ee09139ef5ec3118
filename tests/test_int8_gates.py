"""The gate of int8's accuracy, wherever an int8 network is built: by top-1."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import numpy_helper

from exporters import build
from exporters.artifact import agreement, inputs, onnx_file
from exporters.artifact.reference import Exported
from exporters.artifact.session import TARGETS
from exporters.bundle import make
from exporters.ort import int8
from exporters.ort.session import OrtSession
from pipeline.core.errors import UserError
from tests.test_shape import network

SIDE = 8


class Answers:
    """A session that answers with the rows it was given, stored as int8 and mostly computed in float."""

    runtime, precision_effective = "player 1.0", "fp32"
    input_shape = (None, 3, SIDE, SIDE)
    metadata = {"precision": "int8"}

    def __init__(self, logits: Any) -> None:
        self.logits = logits

    def run(self, x: Any) -> Any:
        return self.logits[: len(x)]


@pytest.mark.parametrize("wrong, verdict", [(0, "PASS"), (1, "FAIL")])
def test_int8_that_computes_mostly_in_float_has_the_gate_of_top1(
    wrong: int, verdict: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    labels = np.arange(16) % 4
    logits = 10 * np.eye(4, dtype=np.float32)[labels]
    logits[:, 3] += 9.9 * (labels == 0)  # a tie but for 0.1
    answers = logits.copy()
    answers[:wrong, 3] += 0.2
    exported: Any = SimpleNamespace(
        x={"student": inputs.smooth(16, SIDE, SIDE)},
        logits={"student": logits},
        labels=labels,
        distilled=None,
    )
    monkeypatch.setattr(build, "open_session", lambda *_: Answers(answers))
    row = build.artefact_parity(
        TARGETS["ort-int8"], "int8", tmp_path / "x.onnx", "student", exported, build.Build()
    )
    assert (row["top1_drop"], row["verdict"]) == (wrong / 16, verdict)
    assert row["sqnr_centered_db"] > 30 and row["precision_effective"] == "fp32"


def test_a_rejected_int8_that_computes_mostly_in_float_is_replaced_by_fp32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []

    def written(precision: str, *_: Any) -> Path:
        made.append(precision)
        path = tmp_path / f"{precision}.onnx"
        path.write_bytes(b"")
        return path

    def judged(_: Any, precision: str, artefact: Path, *__: Any) -> dict[str, Any]:
        row = agreement.skipped_row(artefact.name, "fp32", "top-1 falls")
        return row | {"verdict": "FAIL" if precision == "int8" else "PASS"}

    monkeypatch.setitem(build.RUNTIMES, "ort", SimpleNamespace(make=written))
    monkeypatch.setattr(build, "artefact_parity", judged)
    exported: Any = Exported
    entry, rows = build.build_model(
        TARGETS["ort-int8"], "student", exported, tmp_path, build.Build()
    )
    assert made == ["int8", "fp32"] and not (tmp_path / "int8.onnx").exists()
    assert [row["verdict"] for row in rows] == ["PASS", "REJECTED"]
    assert (entry["artefact"], entry["reason"]) == ("fp32.onnx", "fell back to fp32: top-1 falls")


@pytest.fixture
def pushed(tmp_path: Path) -> Callable[[float], Any]:
    """A network, images on which its answers are close, and itself with a push of the first class."""
    source = network(tmp_path / "net.onnx", 3, SIDE, SIDE)
    held_out = 1e-3 * inputs.smooth(20, SIDE, SIDE, seed=1)
    labels = inputs.run_batches(OrtSession(source, 1), held_out).argmax(axis=1)
    images = int8.CalibrationImages(held_out, held_out, labels)

    def build_variant(push: float) -> Any:
        proto = onnx_file.read_onnx(source)
        for weight in proto.graph.initializer:
            if weight.name == "b2":
                bias = numpy_helper.to_array(weight) + push * np.eye(5, dtype=np.float32)[0]
                weight.CopyFrom(numpy_helper.from_array(bias, "b2"))
        return source, images, onnx_file.add_metadata(proto, precision="int8")

    return build_variant


@pytest.mark.parametrize("push, kept", [(0.0, True), (0.01, False)])
def test_a_bundle_leaves_out_int8_that_loses_top1_on_the_held_out_images(
    push: float,
    kept: bool,
    pushed: Callable[[float], Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, images, variant_proto = pushed(push)
    monkeypatch.setattr(make, "convert_variant", lambda *_: variant_proto)
    x = inputs.smooth(16, SIDE, SIDE)
    logits = inputs.run_batches(OrtSession(source, 1), x)
    variant = next(v for v in make.VARIANTS if v.file == "model-int8-cpu.onnx")
    row, _ = make.add_variant(
        variant,
        source,
        variant_proto,
        tmp_path,
        make.ParityImages(x, "smooth", images),
        logits,
        False,
    )
    assert row["sqnr_centered_db"] > 20  # good enough by the parity inputs alone
    assert (row["top1_drop"] <= 0.01, row["verdict"] == "PASS") == (kept, kept)
    assert (tmp_path / variant.file).exists() == kept


def test_logits_with_two_axes_of_one_are_those_without() -> None:
    answers = np.random.default_rng(0).standard_normal((16, 4)).astype(np.float32)
    x = inputs.smooth(16, SIDE, SIDE)
    assert np.array_equal(inputs.run_batches(Answers(answers[:, :, None, None]), x), answers)
    with pytest.raises(UserError, match=r"first output: got float32 \[16, 4, 2, 1\]"):
        inputs.run_batches(Answers(np.zeros((16, 4, 2, 1), np.float32)), x)
