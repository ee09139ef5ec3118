"""--shape: foreign ONNX networks with dynamic height and width, RGB and grey, through every exporter."""

from __future__ import annotations

import argparse
import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from exporters.artifact import onnx_file
from exporters.artifact.input_shape import fixed_input, parse_shape
from exporters.ort import trained
from exporters.ort.embed import embed_normalisation
from exporters.ort.session import OrtSession
from exporters.ov.session import OvSession
from exporters.trt.plan import read_sidecar
from pipeline.core.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
COMMANDS = ("ort", "ov", "trt", "parity", "bundle", "bench")


def network(path: Path, channels: int, *sides: int | str) -> Path:
    """A classifier of 5 classes that pools over the image, with a dynamic batch."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.standard_normal((8, channels, 3, 3)) * 0.3,
        "w2": draw.standard_normal((5, 8)),
        "b2": np.zeros(5),
    }
    nodes = [
        helper.make_node("Conv", ["image", "w1"], ["c1"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["c1"], ["r1"]),
        helper.make_node("GlobalAveragePool", ["r1"], ["p"]),
        helper.make_node("Flatten", ["p"], ["f"]),
        helper.make_node("Gemm", ["f", "w2", "b2"], ["logits"], transB=1),
    ]
    shape: list[Any] = ["N", channels, *(sides or ("H", "W"))]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["N", 5])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    opsets = [helper.make_opsetid("", 18)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return path


def argv(name: str, net: Path, out: Path) -> list[Any]:
    """The command line of an exporter that reads `net` and writes into `out`, if it writes."""
    more: dict[str, list[Any]] = {
        "ort": [out / "o.onnx"],
        "ov": ["-o", out],
        "trt": ["-o", out / "o.plan", "--backend", "rtx"],
        "parity": [net],
        "bundle": [out / "bundle"],
        "bench": ["--seconds", 0.1, "--rounds", 2],
    }
    return [f"exporters.{name}", net, *more[name]]


@pytest.mark.parametrize("channels", [3, 1])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_dynamic_size_is_fixed_by_shape(
    name: str, channels: int, tmp_path: Path, command: Command
) -> None:
    if name == "trt":
        pytest.importorskip("tensorrt_rtx")
    net, out = network(tmp_path / "net.onnx", channels), tmp_path / "out"
    before = net.read_bytes()
    shape = [2, channels, 24, 16]
    done = command(*argv(name, net, out), "--shape", ",".join(map(str, shape)), torch=False)
    assert done.returncode == 0, done.stderr
    assert net.read_bytes() == before and {p.name for p in tmp_path.iterdir()} <= {net.name, "out"}
    if name == "ort":
        assert list(OrtSession(out / "o.onnx", 1).input_shape) == shape
    elif name == "ov":
        assert list(OvSession(out / "net.xml", 1, "fp32").input_shape) == shape
    elif name == "trt":
        sidecar = read_sidecar(out / "o.plan")
        assert sidecar["input_shape"] == shape and sidecar["shapes"] == [2, 2, 2]
        assert sidecar["onnx"]["file"] == "net.onnx"
    elif name == "bundle":
        manifest = json.loads((out / "bundle" / "manifest.json").read_text())
        assert manifest["input"]["shape"] == shape and manifest["name"] == "net"
        assert np.load(out / "bundle" / "parity-inputs.npy").shape[1:] == (channels, 24, 16)
    else:
        assert str(net) in done.stdout or net.name in done.stdout


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (None, "input axis 2: got a dynamic size in [None, 3, None, None]"),
        ("1,1,24,24", "net.onnx declares [None, 3, None, None]; expected its fixed sizes"),
        ("1,3,999999999,24", "values; expected 134,217,728 at most"),
    ],
)
@pytest.mark.parametrize("name", COMMANDS)
def test_a_missing_or_contradicting_shape_is_one_line(
    name: str, shape: str | None, message: str, tmp_path: Path, command: Command
) -> None:
    if name == "trt":
        pytest.importorskip("tensorrt_rtx")
    net, out = network(tmp_path / "net.onnx", 3), tmp_path / "out"
    more = [] if shape is None else ["--shape", shape]
    done = command(*argv(name, net, out), *more, torch=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert done.stderr.count("\n") == 1
    assert shape is not None or "pass --shape B,C,H,W" in done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and p != net]


@pytest.mark.parametrize("text", ["", "1,3,24", "1,3,0,24", "-1,3,24,24", "1,3,24,24,1", "N,3,8,8"])
def test_a_shape_is_four_whole_numbers(text: str) -> None:
    with pytest.raises(argparse.ArgumentTypeError, match="expected batch, channels, height, width"):
        parse_shape(text)
    assert parse_shape("1, 3,320,0320") == (1, 3, 320, 320)


def test_grey_images_calibrate_int8(tmp_path: Path, command: Command) -> None:
    draw = np.random.default_rng(1)
    folder = tmp_path / "calib"
    folder.mkdir()
    for number in range(16):
        pixels = draw.integers(0, 256, (24, 24, 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    net = network(tmp_path / "net.onnx", 1)
    more = ("--shape", "1,1,24,24", "--precision", "fp32,int8", "--calib", folder)
    done = command("exporters.ort", net, tmp_path / "o.onnx", *more, torch=False)
    assert done.returncode == 0, done.stderr
    assert OrtSession(tmp_path / "o-int8.onnx", 1).input_shape == (1, 1, 24, 24)


def test_a_symbol_of_the_input_is_fixed_wherever_it_stands(
    tmp_path: Path, command: Command
) -> None:
    net = network(tmp_path / "net.onnx", 3)
    done = command("exporters.ort", net, tmp_path / "o.onnx", "--shape", "4,3,8,8", torch=False)
    assert done.returncode == 0, done.stderr
    output = onnx_file.read_onnx(tmp_path / "o.onnx").graph.output[0]
    assert [axis.dim_value for axis in output.type.tensor_type.shape.dim] == [4, 5]


def test_what_lies_beside_the_file_is_read_with_its_fixed_size_too(tmp_path: Path) -> None:
    net = network(tmp_path / "net.onnx", 3)
    proto = onnx_file.add_metadata(onnx_file.read_onnx(net), weights_sha256="b" * 64)
    onnx_file.write_onnx(proto, net)
    ranges = {
        "schema": "cakd.ranges/1",
        "weights_sha256": "a" * 64,
        "activations": {},
        "weights": {},
        "bias": "float",
        "floating": [],
        "sqnr_db": 20.0,
    }
    (tmp_path / "net-ranges.json").write_text(json.dumps(ranges))
    (tmp_path / "parity.json").write_text("{}")
    with fixed_input(net, (1, 3, 16, 16)) as copy:
        assert copy != net and copy.with_name("parity.json").read_text() == "{}"
        assert copy.with_name("net-ranges.json").read_text() == json.dumps(ranges)
    with (
        pytest.raises(
            UserError, match=f"{tmp_path}/net-ranges.json: got ranges of the weights aaa"
        ),
        fixed_input(net, (1, 3, 16, 16)) as copy,
    ):
        trained.beside(copy)


@pytest.mark.parametrize("name", ["ort", "ov"])
def test_a_network_that_fails_at_a_batch_is_one_line(
    name: str, tmp_path: Path, command: Command
) -> None:
    """It declares any batch, and arranges what it pools in three rows on the way."""
    net = network(tmp_path / "net.onnx", 3, 16, 16)
    proto = onnx_file.read_onnx(net)
    for name_of, shape in {"three": [3, -1], "back": [-1, 8]}.items():
        proto.graph.initializer.append(numpy_helper.from_array(np.array(shape), name_of))
    proto.graph.node.insert(4, helper.make_node("Reshape", ["f", "three"], ["r3"]))
    proto.graph.node.insert(5, helper.make_node("Reshape", ["r3", "back"], ["r8"]))
    proto.graph.node[-1].input[0] = "r8"
    onnx.save(proto, net)
    out = {"ort": [tmp_path / "o.onnx"], "ov": ["-o", tmp_path / "o", "--batch", 4]}[name]
    done = command(f"exporters.{name}", net, *out, torch=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert "fails on an input [10, 3, 16, 16]: " in done.stderr or "--batch: got 4" in done.stderr


def test_preprocessing_is_embedded_under_a_batch_without_a_name(tmp_path: Path) -> None:
    proto = onnx_file.read_onnx(network(tmp_path / "net.onnx", 3, 16, 16))
    proto.graph.input[0].type.tensor_type.shape.dim[0].Clear()
    proto.graph.output[0].type.tensor_type.shape.dim[0].Clear()
    onnx.save(embed_normalisation(proto, [0.5] * 3, [0.5] * 3), tmp_path / "u.onnx")
    session = onnxruntime.InferenceSession(tmp_path / "u.onnx")
    (logits,) = session.run(None, {"pixels": np.zeros((7, 16, 16, 3), np.uint8)})
    assert logits.shape == (7, 5)


def test_a_checkpoint_takes_no_shape(exported: Path, tmp_path: Path, command: Command) -> None:
    source = exported / "student.safetensors"
    done = command("exporters.ort", source, tmp_path / "o.onnx", "--shape", "1,3,32,32")
    assert done.returncode == 2 and "--shape: got " in done.stderr and "leave" in done.stderr
    assert not list(tmp_path.iterdir())
