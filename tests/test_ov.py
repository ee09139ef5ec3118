"""ONNX to OpenVINO IR, and OpenVINO as a session that says what it computes in."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from exporters.artifact import agreement, inputs, onnx_file
from exporters.artifact.session import Unavailable
from exporters.ort import int8
from exporters.ort.session import OrtSession
from exporters.ov import convert
from exporters.ov.session import OvSession, openvino_library
from pipeline.core import machine
from pipeline.core.errors import GateFailed, UserError

pytest.importorskip("openvino", reason="the openvino extra is not installed")

Command = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="module")
def ir(
    exported: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory, command: Command
) -> Path:
    """student.xml, student-fp16.xml and student-int8.xml, written by the command line without torch."""
    folder = tmp_path_factory.mktemp("ir")
    done = command(
        *("exporters.ov", exported / "student.onnx", "-o", folder),
        *("--precision", "fp32,fp16,int8", "--calib", digits),
        torch=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("PASS\n") == 3
    return folder


def test_fp32_is_onnx_runtimes_answer_and_a_result_is_ones_own(ir: Path, exported: Path) -> None:
    session = OvSession(ir / "student.xml", 1, "fp32")
    x, other = inputs.smooth(5, 32, 32), inputs.smooth(5, 32, 32, seed=1)
    first = session.run(x)
    kept = first.copy()
    session.run(other)
    assert np.array_equal(first, kept)
    assert np.abs(first - OrtSession(exported / "student.onnx", 1).run(x)).max() < 1e-5


def test_the_effective_precision_is_the_kernels_not_the_files(ir: Path) -> None:
    assert OvSession(ir / "student.xml", 1, "fp32").precision_effective == "fp32"
    assert OvSession(ir / "student-fp16.xml", 1, "fp32").precision_effective == "fp32"
    assert OvSession(ir / "student-int8.xml", 1, "int8").precision_effective == "int8"


def test_without_a_hint_the_row_names_what_the_cpu_took(ir: Path) -> None:
    x = inputs.smooth(16, 32, 32)
    exact, free = (OvSession(ir / "student.xml", 1, p) for p in ("fp32", "default"))
    row = agreement.parity_row(
        ir / "student.xml", free, exact.run(x), free.run(x), agreement.Thresholds()
    )
    rounded = row["rel_between_std"] > 1e-4
    assert row["precision_effective"] in (("bf16", "fp16") if rounded else ("fp32",))


def test_the_notes_travel_in_rt_info(ir: Path, exported: Path) -> None:
    notes = OrtSession(exported / "student.onnx", 1).metadata
    assert OvSession(ir / "student.xml", 1, "fp32").metadata == notes
    assert OvSession(ir / "student-fp16.xml", 1, "fp32").metadata == {**notes, "precision": "fp16"}


def test_openvino_is_imported_without_its_telemetry() -> None:
    code = (
        "import sys; from exporters.ov import session; session.openvino_library(); "
        "sys.exit(any(m.split('.')[0] == 'openvino_telemetry' and sys.modules[m] for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_signal_that_comes_after_two_sessions_have_gone_is_handled(ir: Path) -> None:
    """With a Core for each of them it is a segmentation fault, on a CPU with AMX."""
    code = (
        "import os, signal, sys; from pathlib import Path; from exporters.ov.session import OvSession\n"
        "first, second = (OvSession(Path(sys.argv[1]), 1, 'fp32') for _ in range(2))\n"
        "del first; del second\n"
        "signal.signal(signal.SIGINT, lambda *_: sys.exit(3)); os.kill(os.getpid(), signal.SIGINT)"
    )
    assert subprocess.run([sys.executable, "-c", code, ir / "student.xml"]).returncode == 3


def test_a_lost_bin_and_a_damaged_xml_are_told(ir: Path, tmp_path: Path) -> None:
    shutil.copy(ir / "student.xml", tmp_path)
    with pytest.raises(UserError, match="one of them is missing"):
        OvSession(tmp_path / "student.xml", 1, "fp32")
    (tmp_path / "student.bin").write_bytes(b"")
    (tmp_path / "student.xml").write_text("<net>")
    with pytest.raises(UserError, match="OpenVINO .* rejects it"):
        OvSession(tmp_path / "student.xml", 1, "fp32")


def test_a_compiled_model_is_kept_and_opened_again(
    ir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import openvino

    x, cache = inputs.smooth(3, 32, 32), tmp_path / "cache"
    first = OvSession(ir / "student-int8.xml", 1, "int8", cache)
    monkeypatch.setattr(openvino.Core, "compile_model", None)  # calling it would fail
    again = OvSession(ir / "student-int8.xml", 1, "int8", cache)
    assert np.array_equal(first.run(x), again.run(x))
    assert again.precision_effective == first.precision_effective == "int8"
    assert again.input_shape == first.input_shape and again.metadata == first.metadata


@pytest.mark.parametrize("part", ["blob", "json", "model", "options"])
def test_a_compiled_model_that_was_altered_or_made_otherwise_is_compiled_anew(
    ir: Path, tmp_path: Path, part: str
) -> None:
    for suffix in (".xml", ".bin"):
        shutil.copy(ir / f"student{suffix}", tmp_path)
    path, x, cache = tmp_path / "student.xml", inputs.smooth(3, 32, 32), tmp_path / "cache"
    expected = OvSession(path, 1, "fp32", cache).run(x)
    blob = next(cache.glob("*.blob"))
    whole = blob.read_bytes()
    if part == "blob":
        blob.write_bytes(whole[: len(whole) // 2] + bytes(64) + whole[len(whole) // 2 + 64 :])
    elif part == "json":
        blob.with_name(f"{blob.name}.json").unlink()
    elif part == "model":
        path.write_text(path.read_text() + "<!-- another file -->")
    threads = 2 if part == "options" else 1
    assert np.allclose(OvSession(path, threads, "fp32", cache).run(x), expected, atol=1e-5)
    told = json.loads(blob.with_name(f"{blob.name}.json").read_text())
    assert told["sha256"] == hashlib.sha256(blob.read_bytes()).hexdigest()
    assert told["options"]["INFERENCE_NUM_THREADS"] == str(threads)
    parts = (path, path.with_suffix(".bin"))
    assert told["model_sha256"] == [hashlib.sha256(p.read_bytes()).hexdigest() for p in parts]


def test_the_command_fills_the_cache_and_tells_the_ratio(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    line = (exported / "student.onnx", "-o", tmp_path / "ir", "--cache", tmp_path / "cache")
    done = command("exporters.ov", *line, torch=False)
    assert done.returncode == 0, done.stderr
    assert re.search(
        r"compiled into .*cache; opens in \d+\.\d\d of the CPU time$", done.stdout.strip()
    )
    assert len(list((tmp_path / "cache").iterdir())) == 2


def test_a_fixed_batch_is_in_the_ir_and_changes_no_answer(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    source = exported / "student.onnx"
    done = command("exporters.ov", source, "-o", tmp_path, "--batch", 4, torch=False)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    session = OvSession(tmp_path / "student.xml", 1, "fp32")
    assert session.input_shape == (4, 3, 32, 32)
    x = inputs.smooth(8, 32, 32)
    assert (
        np.abs(inputs.run_batches(session, x) - inputs.run_batches(OrtSession(source, 1), x)).max()
        < 1e-5
    )
    fixed = onnx_file.read_onnx(source)
    fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    onnx_file.write_onnx(fixed, tmp_path / "two.onnx")
    done = command("exporters.ov", tmp_path / "two.onnx", "--batch", 4, torch=False)
    assert done.returncode == 2 and "has a fixed batch of 2; leave --batch out" in done.stderr
    done = command("exporters.ov", source, "--batch", 0, torch=False)
    assert done.returncode == 2 and "--batch: got 0; expected 1 or more" in done.stderr


def test_bfloat16_is_asked_for_by_name(ir: Path) -> None:
    session = OvSession(ir / "student.xml", 1, "bf16")
    has = any(isa in machine.machine()["isa"] for isa in ("avx512_bf16", "amx"))
    assert session.precision_effective == ("bf16" if has else "fp32")


def test_nncf_makes_an_int8_with_the_notes_and_it_goes_through_the_gates(
    exported: Path, digits: Path, tmp_path: Path
) -> None:
    pytest.importorskip("nncf", reason="the nncf extra is not installed")
    source, out = exported / "student.onnx", tmp_path / "student-int8.xml"
    pictures = int8.calibration_images(source, digits)
    reference = OrtSession(source, 1)
    try:
        row = convert.convert_to_ir(source, out, "int8", pictures, int8.Settings(), "nncf")
    except GateFailed as error:
        decibel = float(re.search(r"(\S+) dB, int8 gate 15", str(error)).group(1))
        assert 10 < decibel < 15 and list(tmp_path.iterdir()) == []
        convert._by_nncf(source, pictures, int8.Settings(), out, None)
    else:
        assert row["verdict"] == "PASS" and row["sqnr_centered_db"] >= 15
    session = OvSession(out, 1, "int8")
    assert session.precision_effective == "int8"
    assert session.metadata == {**reference.metadata, "precision": "int8", "int8": "by NNCF"}
    alike = inputs.run_batches(session, pictures.held_out).argmax(1) == inputs.run_batches(
        reference, pictures.held_out
    ).argmax(1)
    assert alike.mean() > 0.8


def test_without_nncf_one_line_says_how_to_get_it(
    exported: Path, digits: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "nncf", None)
    pictures = int8.calibration_images(exported / "student.onnx", digits)
    out = tmp_path / "student-int8.xml"
    with pytest.raises(Unavailable, match=r"pip install '\.\[nncf\]'"):
        convert.convert_to_ir(
            exported / "student.onnx", out, "int8", pictures, int8.Settings(), "nncf"
        )
    assert list(tmp_path.iterdir()) == []


def test_without_openvino_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Unavailable, match=r"pip install '\.\[openvino\]'"):
        openvino_library()


def test_an_input_that_is_no_onnx_is_exit_2(exported: Path, command: Command) -> None:
    done = command("exporters.ov", exported / "student.safetensors", torch=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
