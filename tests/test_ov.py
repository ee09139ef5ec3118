"""ONNX to OpenVINO IR, and OpenVINO as a session that says what it computes in."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("openvino", reason="the openvino extra is not installed")

from exporters import agreement, inputs, ov
from exporters.ort_session import OrtSession
from exporters.ov import OvSession
from exporters.session import Unavailable
from pipeline.errors import UserError

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
    row = agreement.row(ir / "student.xml", free, exact.run(x), free.run(x), agreement.Gates())
    rounded = row["rel_between_std"] > 1e-4
    assert row["precision_effective"] in (("bf16", "fp16") if rounded else ("fp32",))


def test_the_notes_travel_in_rt_info(ir: Path, exported: Path) -> None:
    notes = OrtSession(exported / "student.onnx", 1).metadata
    assert OvSession(ir / "student.xml", 1, "fp32").metadata == notes
    assert OvSession(ir / "student-fp16.xml", 1, "fp32").metadata == {**notes, "precision": "fp16"}


def test_openvino_is_imported_without_its_telemetry() -> None:
    code = (
        "import sys; from exporters import ov; ov._library(); "
        "sys.exit(any(m.split('.')[0] == 'openvino_telemetry' and sys.modules[m] for m in sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_lost_bin_and_a_damaged_xml_are_told(ir: Path, tmp_path: Path) -> None:
    shutil.copy(ir / "student.xml", tmp_path)
    with pytest.raises(UserError, match="one of them is missing"):
        OvSession(tmp_path / "student.xml", 1, "fp32")
    (tmp_path / "student.bin").write_bytes(b"")
    (tmp_path / "student.xml").write_text("<net>")
    with pytest.raises(UserError, match="OpenVINO refuses it"):
        OvSession(tmp_path / "student.xml", 1, "fp32")


def test_without_openvino_the_reason_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(Unavailable, match=r"pip install '\.\[openvino\]'"):
        ov._library()


def test_an_input_that_is_no_onnx_is_exit_2(exported: Path, command: Command) -> None:
    done = command("exporters.ov", exported / "student.safetensors", torch=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
