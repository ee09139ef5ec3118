"""Checkpoint to ONNX and its lower precisions, checked in ONNX Runtime; foreign ONNX without torch."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest

from exporters.artifact import inputs, metadata, onnx_file
from exporters.artifact.eager import EagerSession
from exporters.ort import export, quantize
from exporters.ort.session import OrtSession
from pipeline.core.errors import GateFailed, UserError
from pipeline.models.checkpoint import load

Command = Callable[..., subprocess.CompletedProcess[str]]


def test_the_onnx_says_its_opset_batch_axis_and_notes(exported: Path) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    assert onnx_file.opset(proto) == export.OPSET
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "batch"
    for model in ("teacher", "student"):  # of another normalisation each
        notes = OrtSession(exported / f"{model}.onnx", 1).metadata
        description = json.loads((exported / f"{model}.json").read_text())
        assert metadata.preprocessing(notes) == description["preprocess"]
    assert metadata.classes(notes) == [f"digit {i}, drawn" for i in range(10)]
    assert notes["precision"] == "fp32" and notes["method"] == "cakd" and notes["torch"]


def test_the_onnx_names_no_path_of_the_machine_that_exported(exported: Path) -> None:
    data = (exported / "student.onnx").read_bytes()
    assert b"site-packages" not in data and str(Path.home()).encode() + b"/" not in data
    assert b".py" not in data


@pytest.mark.parametrize("batch", [1, 2, 7])
def test_any_batch_gives_torchs_logits(exported: Path, batch: int) -> None:
    x = inputs.smooth(batch, 32, 32, seed=batch)
    torch_says = EagerSession(*load(exported / "student.safetensors"), 1).run(x)
    assert np.abs(OrtSession(exported / "student.onnx", 1).run(x) - torch_says).max() < 1e-5


def test_the_same_checkpoint_gives_the_same_bytes(exported: Path, tmp_path: Path) -> None:
    row = export.export(exported / "student.safetensors", tmp_path / "again.onnx")
    assert row["verdict"] == "PASS"
    assert (tmp_path / "again.onnx").read_bytes() == (exported / "student.onnx").read_bytes()


def test_an_opset_torch_replaces_in_silence_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="got 17, but torch wrote 18"):
        export.export(exported / "student.safetensors", tmp_path / "s.onnx", opset=17)
    assert not list(tmp_path.iterdir())


def test_an_onnx_that_is_not_the_checkpoint_is_never_written(
    exported: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = onnx_file.read_onnx(damaged)
    monkeypatch.setattr(export, "_trace", lambda *_: wrong)
    with pytest.raises(GateFailed, match="does not compute the checkpoint"):
        export.export(exported / "student.safetensors", tmp_path / "s.onnx")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_that_answers_all_images_alike_is_exported_only_by_force(
    exported: Path, tmp_path: Path
) -> None:
    model, description = load(exported / "student.safetensors")
    for weights in model.parameters():
        weights.data.zero_()
    out = tmp_path / "s.onnx"
    with pytest.raises(
        GateFailed, match="parity is UNDECIDED.*; not written; train it further, or export"
    ):
        export.export_model(model, description, out, export.OPSET)
    assert not list(tmp_path.iterdir())
    row = export.export_model(model, description, out, export.OPSET, force=True)
    assert row["verdict"] == "UNDECIDED" and out.is_file()


def test_preprocessing_is_embedded_in_a_network_that_answers_alike_only_by_force(
    exported: Path, tmp_path: Path
) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    for weight in proto.graph.initializer:
        if len(weight.dims) == 2:
            values = np.zeros(weight.dims, np.float32)
            weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, tmp_path / "alike.onnx")
    out = tmp_path / "out" / "u.onnx"
    with pytest.raises(GateFailed, match="parity is UNDECIDED"):
        export.write_embedded(tmp_path / "alike.onnx", out)
    assert not out.exists()
    assert export.write_embedded(tmp_path / "alike.onnx", out, True)["verdict"] == "UNDECIDED"
    assert out.is_file()


def test_lower_precisions_are_made_checked_and_named_without_torch(
    exported: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    done = command(
        *("exporters.ort", exported / "student.onnx", tmp_path / "s.onnx"),
        *("--precision", "fp32,fp16,int8", "--calib", digits),
        torch=False,
    )
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(": ", 1)[1] for line in done.stdout.splitlines()] == ["PASS"] * 3
    assert done.stderr == ""
    size = {p.stem: p.stat().st_size for p in tmp_path.iterdir()}
    assert size.keys() == {"s", "s-fp16", "s-int8"}
    assert size["s-int8"] < size["s-fp16"] < size["s"]
    assert OrtSession(tmp_path / "s-int8.onnx", 1).precision_effective == "int8"
    assert OrtSession(tmp_path / "s.onnx", 1).precision_effective == "fp32"
    assert OrtSession(tmp_path / "s-fp16.onnx", 1).metadata["precision"] == "fp16"


def zero_points(proto: onnx.ModelProto) -> dict[str, set[str]]:
    """Element types and shapes of the zero points of activations and of weights."""
    held = {w.name: onnx.numpy_helper.to_array(w) for w in proto.graph.initializer}
    found: dict[str, set[str]] = {"activation": set(), "weight": set()}
    for node in proto.graph.node:
        if node.op_type == "DequantizeLinear" and held[node.input[2]].dtype != np.int32:
            kind = "weight" if node.input[0] in held else "activation"
            zero = held[node.input[2]]
            found[kind].add(f"{zero.dtype} {'per channel' if zero.ndim else 'per tensor'}")
            if zero.dtype == np.int8:
                assert not zero.any()
    return found


def test_int8_is_asymmetric_u8_for_cpus_and_symmetric_s8_for_tensorrt(exported: Path) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    x = np.load(exported / "calibration.npy")[:32]
    cpu = zero_points(quantize.to_int8(proto, x))
    assert cpu == {"activation": {"uint8 per tensor"}, "weight": {"int8 per channel"}}
    gpu = zero_points(quantize.to_int8(proto, x, symmetric=True))
    assert gpu == {"activation": {"int8 per tensor"}, "weight": {"int8 per channel"}}


def test_int8_weights_are_a_quarter_of_the_size_and_compute_in_float32(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    source, out = exported / "student.onnx", tmp_path / "s.onnx"
    done = command("exporters.ort", source, out, "--precision", "int8-weights")
    assert done.returncode == 0 and "computes in fp32, weights only" in done.stdout, done.stderr
    proto = onnx_file.read_onnx(tmp_path / "s-int8-weights.onnx")
    assert [n.op_type for n in proto.graph.node].count("DequantizeLinear") == 17
    held = {w.name: onnx.numpy_helper.to_array(w) for w in proto.graph.initializer}
    for weight in quantize.fold(onnx_file.read_onnx(source)).graph.initializer:
        if f"{weight.name}_quantized" in held:
            levels = np.moveaxis(held[f"{weight.name}_quantized"].astype(np.float32), 0, -1)
            exact = np.moveaxis(onnx.numpy_helper.to_array(weight), 0, -1)
            scale = held[f"{weight.name}_scale"]
            assert (np.abs(levels * scale - exact) <= 0.501 * scale).all()
    assert sum(w.ByteSize() for w in proto.graph.initializer) < 0.35 * sum(
        w.ByteSize() for w in onnx_file.read_onnx(source).graph.initializer
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--precision", "int8"], "no --calib"),
        (["--precision", "fp61"], "did you mean 'fp16'?"),
        (["--opset", "20"], "keeps its own opset"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    argv: list[str], said: str, exported: Path, tmp_path: Path, command: Command
) -> None:
    done = command("exporters.ort", exported / "student.onnx", tmp_path / "s.onnx", *argv)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_no_onnx_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a network")
    for read in (onnx_file.read_onnx, lambda path: OrtSession(path, 1)):
        with pytest.raises(UserError, match=r"x\.onnx"):
            read(tmp_path / "x.onnx")


def test_a_foreign_network_with_a_fixed_batch_is_converted_without_torch(
    light: Path, tmp_path: Path, command: Command
) -> None:
    argv = ("exporters.ort", light, tmp_path / "l.onnx", "--precision", "fp32,fp16")
    done = command(*argv, torch=False)
    assert done.returncode == 3 and done.stderr.count("parity is UNDECIDED") == 2, done.stderr
    assert not list(tmp_path.iterdir())
    done = command(*argv, "--force", torch=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("does not react to its input") == 2
    assert OrtSession(tmp_path / "l.onnx", 1).input_shape == (1, 3, 224, 224)


@pytest.mark.slow
def test_a_foreign_network_is_quantized_without_torch(
    light: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    done = command(
        *("exporters.ort", light, tmp_path / "l.onnx", "--precision", "int8", "--calib", digits),
        "--force",  # constant weights: its answers do not depend on the image, which is UNDECIDED
        torch=False,
    )
    assert done.returncode == 0, done.stderr
    assert "ImageNet's mean and std are assumed" in done.stdout
    assert OrtSession(tmp_path / "l-int8.onnx", 1).precision_effective == "int8"
