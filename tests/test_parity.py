"""The figures of parity, the verdict, and the command line that compares two files."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from exporters.artifact import agreement, onnx_file
from exporters.artifact.agreement import Thresholds, compare_outputs
from exporters.ort import quantize
from exporters.parity import layers
from pipeline.core.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
RNG = np.random.default_rng(0)
LOGITS = RNG.standard_normal((32, 10)).astype(np.float32)


def verdict(a: np.ndarray, b: np.ndarray, precision: str = "fp32") -> str:
    return compare_outputs(a, b, precision, Thresholds())[1]


def metrics(a: np.ndarray, b: np.ndarray) -> dict[str, float | None]:
    return compare_outputs(a, b, "fp32", Thresholds())[0]


def test_equal_outputs_pass_with_a_number_json_can_hold() -> None:
    found = metrics(LOGITS, LOGITS)
    assert found["max_abs"] == 0 and found["sqnr_centered_db"] == agreement.BIT_EQUAL_DB
    assert verdict(LOGITS, LOGITS) == "PASS"


def test_sqnr_is_the_noise_that_was_added() -> None:
    noise = RNG.standard_normal(LOGITS.shape) * LOGITS.std() / 100
    assert metrics(LOGITS, LOGITS + noise)["sqnr_centered_db"] == pytest.approx(40, abs=1)


def test_an_offset_shared_by_all_images_earns_no_agreement() -> None:
    large = LOGITS + 1000 * np.arange(10, dtype=np.float32)
    wrong = np.broadcast_to(large.mean(axis=0), large.shape).astype(np.float32)
    found = metrics(large, wrong)
    assert found["top1_agreement"] == 1
    assert found["sqnr_centered_db"] == pytest.approx(0, abs=0.1)
    assert verdict(large, wrong, "int8") == "FAIL"


@pytest.mark.parametrize(
    ("precision", "kept_db", "broken_db"),
    [("fp16", 36, 34), ("bf16", 26, 24), ("int8", 16, 14)],
)
def test_each_precision_has_its_own_gate(precision: str, kept_db: int, broken_db: int) -> None:
    noise = RNG.standard_normal(LOGITS.shape)
    noise *= np.sqrt(((LOGITS - LOGITS.mean(0)) ** 2).sum() / (noise**2).sum())
    for db, expected in ((kept_db, "PASS"), (broken_db, "FAIL")):
        got = LOGITS + noise * 10 ** (-db / 20)
        assert verdict(LOGITS, got, precision) == expected
        assert verdict(LOGITS, got, "fp32") == "FAIL"


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_outputs_that_are_not_finite_fail(bad: float) -> None:
    broken = LOGITS.copy()
    broken[3, 4] = bad
    assert verdict(LOGITS, broken, "int8") == "FAIL"
    assert verdict(broken, broken) == "FAIL"


def test_a_reference_that_answers_every_image_alike_proves_nothing() -> None:
    constant = np.full((8, 10), 0.001, np.float32)
    assert verdict(constant, constant) == "UNDECIDED"
    assert metrics(constant, constant)["sqnr_centered_db"] is None
    assert verdict(constant, constant * 1.5) == "FAIL"
    zeros = np.zeros((8, 10), np.float32)
    assert verdict(zeros, zeros) == "UNDECIDED"


def test_other_shapes_and_a_single_image_are_refused() -> None:
    with pytest.raises(UserError, match="compare two files of the same network"):
        metrics(LOGITS, LOGITS[:, :5])
    with pytest.raises(UserError, match="expected 2 or more"):
        metrics(LOGITS[:1], LOGITS[:1])


def test_the_gate_is_that_of_the_coarsest_storage_or_arithmetic() -> None:
    def session(effective: str, **notes: str) -> SimpleNamespace:
        return SimpleNamespace(precision_effective=effective, metadata=notes)

    assert agreement.coarsest_precision(session("fp32")) == "fp32"
    assert agreement.coarsest_precision(session("fp32", precision="fp16")) == "fp16"
    assert agreement.coarsest_precision(session("fp32"), session("bf16"), session("fp16")) == "bf16"


def test_a_checkpoint_and_its_onnx_agree(exported: Path, digits: Path, command: Command) -> None:
    a, b = exported / "student.safetensors", exported / "student.onnx"
    done = command("exporters.parity", a, b, "--images", digits)
    assert done.returncode == 0 and "PASS" in done.stdout, done.stderr


def test_another_network_is_exit_3_without_torch(
    exported: Path, damaged: Path, command: Command
) -> None:
    done = command("exporters.parity", exported / "student.onnx", damaged, torch=False)
    assert done.returncode == 3 and "FAIL" in done.stdout and done.stderr.count("\n") == 1


def test_layers_name_the_node_where_two_files_part(
    exported: Path, damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    layers.compare_layers(exported / "student.onnx", damaged, None)
    told = capsys.readouterr().out
    gemm = next(n for n in onnx_file.read_onnx(damaged).graph.node if n.op_type == "Gemm")
    assert f"first divergence: {gemm.output[0]}\n" in told and ", 1 below" in told


def test_layers_read_a_quantized_tensor_after_its_dequantization(
    exported: Path, digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    calibration = np.load(exported / "calibration.npy")
    onnx_file.write_onnx(quantize.to_int8(proto, calibration), tmp_path / "q.onnx")
    layers.compare_layers(exported / "student.onnx", tmp_path / "q.onnx", digits)
    assert ", 0 below 15 dB" in capsys.readouterr().out


def test_networks_of_other_sizes_are_exit_2(exported: Path, light: Path, command: Command) -> None:
    done = command("exporters.parity", exported / "student.onnx", light, torch=False)
    assert done.returncode == 2 and "inputs: got" in done.stderr


@pytest.mark.parametrize("argv", [[], pytest.param(["--layers"], marks=pytest.mark.slow)])
def test_a_network_of_constant_weights_is_told_and_not_divided_by_zero(
    argv: list[str], light: Path, command: Command
) -> None:
    done = command("exporters.parity", light, light, *argv, torch=False)
    assert done.returncode == (0 if argv else 3), done.stderr
    assert "does not react" in done.stderr or ", 0 below" in done.stdout


def test_a_damaged_checkpoint_is_exit_2(exported: Path, tmp_path: Path, command: Command) -> None:
    for suffix in (".safetensors", ".json"):
        data = (exported / f"student{suffix}").read_bytes()
        (tmp_path / f"s{suffix}").write_bytes(data[:-2] + b"}\n")
    done = command("exporters.parity", tmp_path / "s.safetensors", exported / "student.onnx")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
