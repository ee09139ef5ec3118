"""The search for nodes that int8 cannot hold: what is freed first, when it ends, what it returns."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.artifact import agreement, inputs, onnx_file
from exporters.device import parity
from exporters.ort import int8, quantize, sensitive, session
from exporters.ort.sensitive import Trial

HARM = {"a": 1.0, "b": 9.0, "c": 0.5, "d": 4.0}  # what a node costs in dB while it is in int8


class Nodes:
    """Stands for `quantize.Calibrated`: a network is the set of nodes left in float."""

    groups = {name: [name] for name in HARM}

    def quantized(self, floating: Sequence[str] = ()) -> frozenset[str]:
        """The nodes in float."""
        return frozenset(floating)


def decibel(network: frozenset[str]) -> float:
    """30 dB less the harm of what is in int8."""
    return 30 - sum(harm for name, harm in HARM.items() if name not in network)


def found(floor: float, seconds: float = 60.0) -> sensitive.Found:
    """The search on those nodes, with a gate of `floor` dB."""

    def judge(network: frozenset[str]) -> Trial:
        return Trial(decibel(network) >= floor, decibel(network))

    return sensitive.search(Nodes(), judge, seconds)  # type: ignore[arg-type]


def test_what_meets_its_gates_is_left_as_it_is() -> None:
    made = found(15.0)
    assert made.floating == () and made.trials == 1 and made.summary() == "every node in int8"


def test_the_most_harmful_nodes_are_freed_first_and_no_more_than_needed() -> None:
    assert found(24.0).floating == ("b",)
    made = found(28.0)
    assert made.floating == ("b", "d") and made.trial.passed and made.trials == 1 + 4 + 2
    assert made.summary() == "2 groups of nodes left in float after 7 trials"


def test_half_the_nodes_at_most_are_freed_and_the_best_is_returned() -> None:
    made = found(29.9)
    assert made.floating == ("b", "d") and not made.trial.passed
    assert made.summary().endswith("out of groups")


def test_the_search_ends_in_time(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(sensitive.time, "monotonic", lambda: next(ticks))
    made = found(28.0, seconds=45.0)  # half of it ranks two groups, the rest frees one
    assert not made.trial.passed and made.trials == 1 + 2 + 1
    assert made.summary() == "1 group of nodes left in float after 4 trials, out of time"


BAD = 1  # which convolution is harmed


@pytest.fixture(scope="module")
def harmed(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The student with a convolution whose outliers spoil a range: a filter times 300, undone after its ReLU.

    Undone at once, ONNX Runtime would fold it away.
    """
    proto = onnx_file.read_onnx(exported / "student.onnx")
    held = {w.name: w for w in proto.graph.initializer}
    node = [n for n in proto.graph.node if n.op_type == "Conv"][BAD]
    weight, bias = (onnx.numpy_helper.to_array(held[name]).copy() for name in node.input[1:])
    relu = next(n for n in proto.graph.node if node.output[0] in n.input)
    reader = next(n for n in proto.graph.node if relu.output[0] in n.input)
    assert relu.op_type == "Relu"
    scale = np.ones((1, len(bias), 1, 1), np.float32)
    scale[0, 0] = 300.0
    weight *= scale.reshape(-1, 1, 1, 1)
    bias *= scale.ravel()
    for name, value in zip(node.input[1:], (weight, bias), strict=True):
        held[name].CopyFrom(onnx.numpy_helper.from_array(value, name))
    undone = onnx.numpy_helper.from_array(1 / scale, "undone")
    proto.graph.initializer.append(undone)
    fixed = onnx.helper.make_node("Mul", [relu.output[0], "undone"], ["fixed"], name="fixed")
    reader.input[list(reader.input).index(relu.output[0])] = "fixed"
    proto.graph.node.insert(list(proto.graph.node).index(reader), fixed)
    path = tmp_path_factory.mktemp("harmed") / "harmed.onnx"
    onnx_file.write_onnx(proto, path)
    return path


def test_a_network_with_one_bad_node_is_shipped_with_that_node_in_float(
    harmed: Path, exported: Path
) -> None:
    x = np.load(exported / "calibration.npy")
    held = x[1::2]
    expected = inputs.run_batches(session.OrtSession(harmed, 1), held)

    def decibel(proto: onnx.ModelProto) -> float:
        path = harmed.with_name("tried.onnx")
        onnx_file.write_onnx(proto, path)
        got = inputs.run_batches(session.OrtSession(path, 1), held)
        return parity.logit_metrics(expected, got)["sqnr_centered_db"]

    bad = [n.name for n in onnx_file.read_onnx(harmed).graph.node if n.op_type == "Conv"][BAD]
    with quantize.Calibrated(onnx_file.read_onnx(harmed), x[::2]) as net:
        whole, freed = decibel(net.quantized()), decibel(net.quantized([bad]))
    assert freed > whole + 0.5
    gates = agreement.Thresholds(int8_db=(whole + freed) / 2)
    pictures = int8.CalibrationImages(x[::2], held, np.full(len(held), -1))
    proto = int8.quantize_within_gates(harmed, pictures, int8.Settings(), gates)
    assert onnx_file.read_metadata(proto)["int8"].startswith("1 group of nodes left in float after")
    assert decibel(proto) == freed


@pytest.mark.parametrize("method", quantize.METHODS)
def test_every_calibration_gives_int8_that_passes(method: str, exported: Path) -> None:
    x = np.load(exported / "calibration.npy")[:32]
    proto = onnx_file.read_onnx(exported / "student.onnx")
    made = quantize.to_int8(proto, x, method=method)
    ops = onnx_file.histogram(made)
    assert ops["QuantizeLinear"] > 10 and onnx_file.read_metadata(made)["precision"] == "int8"
