"""Stages export and build as processes: what they write, what they skip, when they fall back, when they fail."""

from __future__ import annotations

import importlib.util
import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters import build
from exporters.artifact import inputs
from exporters.artifact.reference import IMAGES, Exported
from exporters.artifact.session import TARGETS
from exporters.build import Build
from exporters.open import open_session
from exporters.trt import driver
from pipeline.data.prepared import Prepared, normalised
from tests import artefacts
from tests.conftest import CROP_PCT

Command = Callable[..., subprocess.CompletedProcess[str]]
ROW = {
    *("artifact", "runtime", "precision_effective", "max_abs", "rel_between_std"),
    *("sqnr_centered_db", "top1_agreement", "verdict"),
}
ENTRY = {
    *("status", "reason", "artefact", "precision_requested", "precision_effective"),
    *("size_mb", "seconds"),
}
openvino = pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the openvino extra is not installed"
)
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the trt-rtx extra is not installed"
)


def test_export_says_what_it_wrote_in_one_line(exported: Path) -> None:
    told = (exported.parent / "told.txt").read_text()
    assert told.count("\n") == 1 and "opset 18" in told and "max abs" in told


def test_the_reference_is_the_val_split_with_torchs_own_logits(
    exported: Path, digits: Path
) -> None:
    held = np.load(exported / "reference.npz", allow_pickle=False)
    prepared = Prepared.open(digits)
    preprocess = json.loads((exported / "student.json").read_text())["preprocess"]
    val = normalised(prepared.images.squares(prepared.rows("val"), CROP_PCT), preprocess)
    assert held["x"].shape == (64, 3, 32, 32) and held["x"].dtype == np.float32
    assert all((val == image).all(axis=(1, 2, 3)).any() for image in held["x"])
    for model in ("student", "teacher"):
        session = open_session(TARGETS["torch-eager"], exported / f"{model}.safetensors", 1)
        assert np.abs(inputs.run_batches(session, held[IMAGES[model]]) - held[model]).max() < 1e-5
    assert len(set(held["labels"])) == 10


def test_calibration_shows_training_images_only(exported: Path, digits: Path) -> None:
    shown = np.load(exported / "calibration.npy", allow_pickle=False)
    assert shown.shape == (96, 3, 32, 32) and shown.dtype == np.float32
    prepared = Prepared.open(digits)
    preprocess = json.loads((exported / "student.json").read_text())["preprocess"]
    train = normalised(prepared.images.squares(prepared.rows("train"), CROP_PCT), preprocess)
    assert all((train == image).all(axis=(1, 2, 3)).any() for image in shown)


def test_export_json_holds_the_figures_of_the_hard_gates(exported: Path) -> None:
    document = json.loads((exported / "export.json").read_text())
    assert document["schema"] == "cakd.export/1" and document["opset"] == 18
    assert document["machine"]["cpu"] and document["provenance"]["inputs"].keys() >= {"student"}
    student = document["models"]["student"]
    assert student["ops"]["Conv"] == 16 and student["params"] > 0 and student["macs"] > 0
    assert student["parity"]["verdict"] == "PASS" and student["size_mb"] > 0.1


def test_images_of_another_size_than_the_models_are_exit_2(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    from pipeline.prepare.prepare import prepare
    from pipeline.prepare.settings import Prepare

    other = tmp_path / "prepared"
    prepare(Prepare("digits", image_size=16, val=20, test=20), other)
    paths = [*chosen(exported), exported / "teacher.safetensors", other]
    params = exported.parent / "params.yaml"
    done = command("stages.export", *paths, tmp_path / "out", "--params", params)
    assert done.returncode == 2 and "prepared 16 px" in done.stderr and done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def chosen(exported: Path) -> list[Path]:
    """The folders of students and the selection that `exported` was made of."""
    return [exported.parent / name for name in ("students", "selection.json", "quantized")]


def test_a_selection_or_student_of_another_method_is_exit_2(
    exported: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    params, selection, students = (tmp_path / n for n in ("params.yaml", "selection.json", "s"))
    shutil.copytree(exported.parent / "students" / "cakd", students / "logits")
    selection.write_text(json.dumps(artefacts.selection("logits")))
    quantized = tmp_path / "quantized"
    paths = [
        students,
        selection,
        quantized,
        exported / "teacher.safetensors",
        digits,
        tmp_path / "out",
    ]
    for method, message in (
        ("cakd", f"{selection}: got 'logits'; expected 'cakd', export.method; run select again"),
        ("best", "got a student of cakd; expected one of logits, which is selected; run distill"),
    ):
        params.write_text(f"export:\n  method: {method}\n")
        done = command("stages.export", *paths, "--params", params)
        assert done.returncode == 2 and done.stderr.count("\n") == 1
        assert message in done.stderr
    assert not (tmp_path / "out").exists()


def run_build(
    command: Command, exported: Path, tmp_path: Path, target: str, **gates: float
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any], list[dict[str, Any]]]:
    params = tmp_path / "params.yaml"
    params.write_text(json.dumps({"build": {"trt_shapes": [1, 1, 4], **gates}}))
    out = tmp_path / target
    done = command(
        *("stages.build", exported, out, "--target", target, "--params", params),
        torch=target != "ort-fp32",
    )
    assert done.returncode in (0, 3), done.stderr
    assert done.stdout.count("\n") == 1
    models = json.loads((out / "build.json").read_text())
    parity = json.loads((out / "parity.json").read_text())
    assert (models["schema"], parity["schema"]) == ("cakd.build/1", "cakd.parity/1")
    assert models["target"] == target and models["machine"] and models["provenance"]
    assert all(entry.keys() >= ENTRY for entry in models["models"].values())
    assert all(row.keys() >= ROW for row in parity["rows"])
    for entry in models["models"].values():
        assert entry["artefact"] is None or (out / entry["artefact"]).is_file()
    return done, models["models"], parity["rows"]


@pytest.mark.parametrize(
    "target", ["torch-eager", "ort-fp32", pytest.param("ov-fp32", marks=openvino)]
)
def test_both_models_are_built_and_pass_at_fp32(
    target: str, exported: Path, tmp_path: Path, command: Command
) -> None:
    done, models, rows = run_build(command, exported, tmp_path, target)
    assert done.returncode == 0
    assert [m["status"] for m in models.values()] == ["built", "built"]
    assert [r["verdict"] for r in rows] == ["PASS", "PASS"]
    artefact = tmp_path / target / models["student"]["artefact"]
    assert artefact.name == TARGETS[target].artefact.format(model="student")
    assert open_session(TARGETS[target], artefact, 1).precision_effective == "fp32"


@pytest.mark.parametrize("target", ["ort-int8", pytest.param("ov-int8", marks=openvino)])
def test_int8_is_built_for_the_student_and_left_out_for_the_teacher(
    target: str, exported: Path, tmp_path: Path, command: Command
) -> None:
    done, models, rows = run_build(command, exported, tmp_path, target, int8_drop=1.0)
    assert done.returncode == 0
    assert models["student"]["precision_effective"] == "int8" and "top1_drop" in rows[0]
    assert (
        models["teacher"]["status"] == "skipped" and "student only" in models["teacher"]["reason"]
    )
    assert [r["verdict"] for r in rows] == ["PASS", "skipped"]


@pytest.mark.parametrize("gate", [{"int8_db": 99.0}, {"int8_drop": -1.0}])
def test_int8_that_fails_its_gate_gives_way_to_fp32(
    gate: dict[str, float], exported: Path, tmp_path: Path, command: Command
) -> None:
    done, models, rows = run_build(command, exported, tmp_path, "ort-int8", **gate)
    assert done.returncode == 0 and "fell back to fp32" in done.stdout
    student = models["student"]
    assert student["artefact"] == "student.onnx" and student["precision_effective"] == "fp32"
    assert student["precision_requested"] == "int8" and "gate" in student["reason"]
    assert [r["verdict"] for r in rows] == ["PASS", "REJECTED", "skipped"]
    assert not (tmp_path / "ort-int8/student-int8.onnx").exists()


def test_a_build_that_parity_cannot_decide_fails_as_one_that_fails() -> None:
    rows = [
        {"artifact": f"{verdict}.onnx", "verdict": verdict, "reason": "why"}
        for verdict in ("PASS", "FAIL", "UNDECIDED", "REJECTED", "skipped")
    ]
    assert build.failures(rows) == "FAIL.onnx: why; UNDECIDED.onnx: parity is UNDECIDED, why"


def test_a_broken_fp32_is_exit_3_after_writing(
    exported: Path, damaged: Path, tmp_path: Path, command: Command
) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(exported, broken)
    shutil.copy(damaged, broken / "student.onnx")
    done, _, rows = run_build(command, broken, tmp_path, "ort-fp32")
    assert done.returncode == 3 and "student.onnx" in done.stderr
    assert [r["verdict"] for r in rows] == ["FAIL", "PASS"]


@rtx
@pytest.mark.skipif(driver.device() is not None, reason="this machine has a GPU")
def test_an_rtx_engine_is_built_without_a_gpu_and_its_parity_skipped(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    done, models, rows = run_build(command, exported, tmp_path, "rtx-fp16")
    assert done.returncode == 0
    assert [m["status"] for m in models.values()] == ["built", "built"]
    assert [(r["verdict"], r["reason"]) for r in rows] == [("skipped", "no CUDA device")] * 2
    sidecar = json.loads((tmp_path / "rtx-fp16/student.plan.json").read_text())
    assert sidecar["precision"] == "fp16" and sidecar["shapes"] == [1, 1, 4]


@pytest.mark.skipif(driver.device() is not None, reason="this machine has a GPU")
def test_a_missing_back_end_is_a_record_and_exit_0(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    done, models, rows = run_build(command, exported, tmp_path, "trt-fp16")
    assert done.returncode == 0
    assert all(m["status"] == "skipped" and m["reason"] for m in models.values())
    assert all(r["verdict"] == "skipped" and r["max_abs"] is None for r in rows)


@openvino
def test_a_default_precision_that_fails_its_gate_is_not_shipped(
    exported: Path, tmp_path: Path
) -> None:
    gates = Build(bf16_db=99.0, fp16_db=99.0)
    entry, rows = build.build_model(
        TARGETS["ov-default"], "student", Exported.open(exported), tmp_path, gates
    )
    if rows[0]["precision_effective"] == "fp32":
        pytest.skip("OpenVINO's default is fp32 on this CPU")
    assert entry["status"] == "skipped" and "ov-default offers nothing else" in entry["reason"]
    assert rows[0]["verdict"] == "REJECTED" and not list(tmp_path.iterdir())


def test_a_folder_that_is_no_export_is_exit_2(tmp_path: Path, command: Command) -> None:
    (tmp_path / "reference.npz").write_bytes(b"PK\x03\x04 not a zip")
    params = tmp_path / "params.yaml"
    params.write_text("build: {}\n")
    argv = (tmp_path, tmp_path / "out", "--target", "ort-fp32", "--params", params)
    done = command("stages.build", *argv, torch=False)
    assert done.returncode == 2 and "not an export" in done.stderr
    assert done.stderr.count("\n") == 1
