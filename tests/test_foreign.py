"""ONNX files of others and calibration sets that cannot calibrate: one line, the other precisions left alone."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from PIL import Image

from exporters.artifact import counts, metadata, onnx_file
from exporters.ort import quantize
from exporters.ort.session import OrtSession
from pipeline.core.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
GELU = ("Gelu", "com.microsoft")  # an operator whose shapes ONNX does not infer


def network(
    path: Path, batch: int | str = "N", middle: tuple[str, str] | None = None, opset: int = 18
) -> Path:
    """A classifier of 16 px: convolution, perhaps one more operator, convolution, pooling, product."""
    draw = np.random.default_rng(0)
    weights = {
        "w1": draw.standard_normal((8, 3, 3, 3)) * 0.3,
        "w2": draw.standard_normal((8, 8, 3, 3)) * 0.2,
        "b2": np.zeros(8),
        "w3": draw.standard_normal((5, 8)),
        "b3": np.zeros(5),
    }
    node, last = helper.make_node, "r1"
    nodes = [
        node("Conv", ["image", "w1"], ["c1"], name="first", pads=[1] * 4),
        node("Relu", ["c1"], ["r1"]),
    ]
    if middle is not None:
        kind, domain = middle
        nodes.append(node(kind, [last], ["m"], name="middle", domain=domain))
        last = "m"
    nodes += [
        node("Conv", [last, "w2", "b2"], ["c2"], name="second", pads=[1] * 4, strides=[2, 2]),
        node("GlobalAveragePool", ["c2"], ["p"]),
        node("Flatten", ["p"], ["f"]),
        node("Gemm", ["f", "w3", "b3"], ["logits"], transB=1),
    ]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [batch, 3, 16, 16])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [batch, 5])],
        [numpy_helper.from_array(w.astype(np.float32), n) for n, w in weights.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=imports, ir_version=8), path)
    return path


def images(folder: Path, classes: int = 3, each: int = 4, **kind: bool) -> Path:
    """Random images in class folders; `same`: all of them alike, `flat`: each of one colour."""
    draw = np.random.default_rng(1)
    first = draw.integers(0, 256, (16, 16, 3), dtype=np.uint8)
    for name in "abcdefgh"[:classes]:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            pixels = first if kind.get("same") else draw.integers(0, 256, (16, 16, 3), np.uint8)
            if kind.get("flat"):
                pixels = np.full_like(first, draw.integers(0, 256))
            Image.fromarray(pixels).save(folder / name / f"{number}.png")
    return folder


@pytest.mark.parametrize("batches", [(16, 16), (64, 48), (7, "N"), (1, 5)])
def test_networks_of_any_fixed_batches_are_compared(
    batches: tuple[int | str, int | str], tmp_path: Path, command: Command
) -> None:
    a, b = (network(tmp_path / f"{i}.onnx", size) for i, size in enumerate(batches))
    done = command("exporters.parity", a, b, torch=False)
    assert done.returncode == 0 and "PASS" in done.stdout, done.stderr


def test_fewer_images_than_a_fixed_batch_are_told_with_both_numbers(
    tmp_path: Path, command: Command
) -> None:
    a = network(tmp_path / "a.onnx", 16)
    folder = images(tmp_path / "f", classes=3, each=1)
    done = command("exporters.parity", a, a, "--images", folder, torch=False)
    assert done.returncode == 2 and "got 3 images; expected 16 or more" in done.stderr


def test_a_quantizer_that_gives_up_names_the_node_and_leaves_the_rest_alone(
    tmp_path: Path, command: Command
) -> None:
    net, calib = network(tmp_path / "n.onnx", middle=GELU), images(tmp_path / "c")
    out, all_of_them = tmp_path / "o.onnx", "fp32,fp16,int8"
    argv = ("--precision", all_of_them, "--calib", calib)
    done = command("exporters.ort", net, out, *argv, torch=False)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "from the converter" in done.stderr and "at node 'middle' (Gelu)" in done.stderr
    assert out.exists() and out.with_stem("o-fp16").exists()
    assert not out.with_stem("o-int8").exists()


def test_a_bundle_is_made_without_the_precision_that_the_quantizer_refuses(
    tmp_path: Path, command: Command
) -> None:
    net, calib = network(tmp_path / "n.onnx", middle=GELU), images(tmp_path / "c")
    done = command("exporters.bundle", net, tmp_path / "b", "--calib", calib, torch=False)
    assert done.returncode == 0, done.stderr
    assert "left out: int8" in done.stdout and "(Gelu)" in done.stdout
    assert (tmp_path / "b" / "model-fp32.onnx").exists()


def test_the_error_of_a_library_without_a_name_tells_the_foreign_operators(tmp_path: Path) -> None:
    model = onnx.load(network(tmp_path / "n.onnx", middle=GELU))
    with (
        pytest.raises(UserError, match=r"\(no idea\); it holds com.microsoft.Gelu; expected"),
        onnx_file.library_errors(model, "fp16"),
    ):
        raise RuntimeError("no idea")
    with (
        pytest.raises(UserError, match="at node 'second' \\(Conv\\)"),
        onnx_file.library_errors(model, "fp16"),
    ):
        raise KeyError("second")
    with pytest.raises(UserError, match="^mine$"), onnx_file.library_errors(model, "fp16"):
        raise UserError("mine")


def test_products_of_unknown_shape_are_not_counted(tmp_path: Path) -> None:
    known, unknown = network(tmp_path / "k.onnx"), network(tmp_path / "u.onnx", middle=GELU)
    assert counts.count_model(known).macs == 8 * 27 * 256 + 8 * 72 * 64 + 40
    found = counts.count_model(unknown)
    assert found.macs is None and found.params == counts.count_model(known).params


def test_a_conversion_of_opset_that_changes_the_answers_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = onnx.load(network(tmp_path / "n.onnx", opset=9))
    assert onnx_file.opset(quantize.fold(old)) >= 17
    exact = onnx.version_converter.convert_version

    def harmful(model: onnx.ModelProto, opset: int) -> onnx.ModelProto:
        made = exact(model, opset)
        weight = made.graph.initializer[0]
        wrong = numpy_helper.to_array(weight) * np.float32(1.1)
        weight.CopyFrom(numpy_helper.from_array(wrong, weight.name))
        return made

    monkeypatch.setattr(onnx.version_converter, "convert_version", harmful)
    with pytest.raises(UserError, match="opset: got other outputs after the conversion from 9 to"):
        quantize.fold(old)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ({"same": True}, "got 1 different images that are not of one colour, of 12; expected 8"),
        ({"flat": True}, "got 0 different images that are not of one colour, of 12; expected 8"),
        ({"classes": 1, "each": 7}, "got 7 images; expected 8 or more"),
    ],
)
def test_a_set_that_cannot_calibrate_is_refused_and_nothing_is_written(
    kind: dict[str, int], message: str, tmp_path: Path, command: Command
) -> None:
    net, calib = network(tmp_path / "n.onnx"), images(tmp_path / "c", **kind)
    argv = ("--precision", "int8", "--calib", calib)
    done = command("exporters.ort", net, tmp_path / "o.onnx", *argv, torch=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not list(tmp_path.glob("o*"))


def test_images_of_one_class_of_the_networks_own_are_refused(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    first = metadata.classes(OrtSession(exported / "student.onnx", 1).metadata)[0]
    made = images(tmp_path / "c", classes=1, each=12)
    (made / "a").rename(made / first)
    argv = ("--precision", "int8", "--calib", made)
    done = command(
        "exporters.ort", exported / "student.onnx", tmp_path / "o.onnx", *argv, torch=False
    )
    assert done.returncode == 2 and "got images of 1 class of 10" in done.stderr, done.stderr


def test_a_broken_image_is_told_with_a_remedy_of_this_command(
    tmp_path: Path, command: Command
) -> None:
    net, calib = network(tmp_path / "n.onnx"), images(tmp_path / "c")
    (calib / "a" / "2.png").write_bytes(b"x")
    argv = ("--precision", "int8", "--calib", calib)
    done = command("exporters.ort", net, tmp_path / "o.onnx", *argv, torch=False)
    assert done.returncode == 2 and "a/2.png: not a readable image" in done.stderr
    assert "repair or remove it" in done.stderr and "prepare.on_error" not in done.stderr
