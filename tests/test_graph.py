"""What a file holds is counted right: against PyTorch's count, by hand on small networks, ONNX and IR alike."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from exporters.artifact import counts
from exporters.ort import int8
from exporters.ov import convert


def net(
    path: Path, nodes: list[onnx.NodeProto], weights: dict[str, np.ndarray], batch: int | str
) -> Path:
    """An ONNX file from `image` (batch, 3, 8, 8) to `logits`."""
    made = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["n", "k"])],
        [numpy_helper.from_array(w, name) for name, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(made, opset_imports=opsets, ir_version=10), path)
    return path


def small(path: Path, batch: int | str) -> Path:
    """A grouped convolution with stride 2, a product and a Gemm whose first argument is turned."""
    nodes = [
        helper.make_node("Conv", ["image", "k"], ["map"], group=3, strides=[2, 2], pads=[1] * 4),
        helper.make_node("Reshape", ["map", "rows"], ["flat"]),
        helper.make_node("MatMul", ["flat", "w"], ["mid"]),
        helper.make_node("Transpose", ["mid"], ["turned"]),
        helper.make_node("Gemm", ["turned", "v"], ["logits"], transA=1),
    ]
    weights = {
        "k": np.ones((6, 1, 3, 3), np.float32),
        "rows": np.array([-1, 96], np.int64),
        "w": np.ones((96, 5), np.float32),
        "v": np.ones((5, 7), np.float32),
    }
    return net(path, nodes, weights, batch)


@pytest.mark.parametrize("batch", ["batch", 1, 4])
def test_products_are_counted_for_one_image_whatever_the_batch(
    tmp_path: Path, batch: int | str
) -> None:
    found = counts.count_model(small(tmp_path / "net.onnx", batch))
    assert found.macs == 6 * 4 * 4 * 9 + 96 * 5 + 5 * 7
    assert found.params == 6 * 9 + 96 * 5 + 5 * 7  # the shape of Reshape is no weight
    assert found.opset == 18
    kinds = ("Conv", "Reshape", "MatMul", "Transpose", "Gemm")
    assert found.operators == dict.fromkeys(kinds, 1)


@pytest.mark.parametrize("batch", ["batch", 1])
def test_the_ir_counts_as_its_onnx(tmp_path: Path, batch: int | str) -> None:
    pytest.importorskip("openvino")
    source = small(tmp_path / "net.onnx", batch)
    convert.write_ir(source, tmp_path / "net.xml")
    found = counts.count_model(tmp_path / "net.xml")
    assert found.macs == counts.count_model(source).macs
    assert found.operators and not {"Const", "Parameter", "Result"} & set(found.operators)
    assert found.params == pytest.approx(
        counts.count_model(source).params, abs=5
    )  # scalars it adds


def test_the_student_counts_as_pytorch_counts_it(exported: Path) -> None:
    told = json.loads((exported / "export.json").read_text())["models"]["student"]
    found = counts.count_model(exported / "student.onnx")
    assert found.macs == told["macs"]
    assert found.operators == told["ops"]
    assert found.params == pytest.approx(told["params"], rel=0.02)  # batch norms are folded


def test_int8_adds_nodes_but_neither_parameters_nor_products(
    exported: Path, tmp_path: Path
) -> None:
    source = exported / "student.onnx"
    x = np.load(exported / "calibration.npy")
    pictures = int8.CalibrationImages(x[::2], x[1::2], np.full(len(x[1::2]), -1))
    how = int8.Settings(search_s=0.0, max_drop=1.0)
    gates = int8.agreement.Thresholds(int8_db=-200.0)
    proto = int8.quantize_within_gates(source, pictures, how, gates)
    onnx.save(proto, tmp_path / "int8.onnx")
    fp32, found = counts.count_model(source), counts.count_model(tmp_path / "int8.onnx")
    assert found.macs == fp32.macs
    assert found.params == pytest.approx(fp32.params, rel=0.01)
    assert found.operators and found.operators["DequantizeLinear"] > 0


def test_what_cannot_be_read_is_unknown_and_no_error(tmp_path: Path) -> None:
    for name in ("a.onnx", "a.xml", "a.plan"):
        (tmp_path / name).write_bytes(b"no network")
    for name in ("a.onnx", "a.xml", "a.plan", "gone.onnx"):
        assert counts.count_model(tmp_path / name) == counts.ModelCounts()


def test_an_operator_of_unknown_shape_leaves_the_products_unknown(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Strange", ["image"], ["x"], domain="acme"),
        helper.make_node("MatMul", ["x", "w"], ["logits"]),
    ]
    path = net(tmp_path / "net.onnx", nodes, {"w": np.ones((8, 2), np.float32)}, 1)
    model = onnx.load(path)
    model.opset_import.append(helper.make_opsetid("acme", 1))
    onnx.save(model, path)
    found = counts.count_model(path)
    assert found.macs is None and found.params == 16
    assert found.operators == {"Strange": 1, "MatMul": 1}
