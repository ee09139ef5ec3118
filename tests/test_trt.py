"""TensorRT engines: built by RTX without a GPU, described by their sidecar, refused where they cannot run."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import pytest

from exporters import agreement, cuda, engine, inputs, onnx_file, trt
from exporters.ort import OrtSession
from exporters.session import Unavailable
from pipeline.errors import UserError

Command = Callable[..., subprocess.CompletedProcess[str]]
rtx = pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None,
    reason="the trt-rtx extra is not installed",
)


@pytest.fixture(scope="module")
def plans(
    exported: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory, command: Command
) -> dict[str, Path]:
    """One RTX engine a precision, named by the command line, built without torch."""
    folder = tmp_path_factory.mktemp("plans")
    source = Path(shutil.copy(exported / "student.onnx", folder))
    done = command(
        *("exporters.trt", source, "--backend", "rtx"),
        *("--precision", "fp32,fp16,int8", "--calib", digits),
        torch=False,
    )
    assert done.returncode == 0, done.stderr
    return {p.stem.rsplit("-", 1)[1]: p for p in folder.glob("student.rtx*.plan")}


@rtx
def test_every_precision_is_built_and_told_in_its_sidecar(plans: dict[str, Path]) -> None:
    assert plans.keys() == {"fp32", "fp16", "int8"}
    for precision, plan in plans.items():
        sidecar = engine.read_sidecar(plan)
        assert sidecar["precision"] == sidecar["notes"]["precision"] == precision
        assert sidecar["backend"] == "rtx" and f"rtx{sidecar['version'][:3]}" in plan.name
        assert sidecar["shapes"] == [1, 1, 8] and sidecar["input_shape"] == [None, 3, 32, 32]
        assert sidecar["onnx"]["opset"] == 18 and sidecar["notes"]["image_size"] == "32"


@rtx
@pytest.mark.skipif(cuda.device() is not None, reason="this machine has a GPU")
def test_without_a_gpu_a_plan_says_what_it_is_and_that_it_cannot_run(
    plans: dict[str, Path], command: Command
) -> None:
    done = command("exporters.trt", "info", plans["fp16"], torch=False)
    assert done.returncode == 0 and "precision fp16" in done.stdout
    assert "runs here: no, no CUDA device" in done.stdout
    with pytest.raises(Unavailable, match="no CUDA device"):
        trt.TrtSession(plans["fp16"])
    source = plans["fp16"].with_name("student.onnx")
    done = command("exporters.parity", source, plans["fp16"], torch=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@rtx
def test_a_plan_without_its_own_sidecar_is_refused(plans: dict[str, Path], tmp_path: Path) -> None:
    plan = Path(shutil.copy(plans["fp32"], tmp_path / "s.plan"))
    with pytest.raises(UserError, match="its maker is unknown"):
        engine.read_sidecar(plan)
    shutil.copy(engine.sidecar_of(plans["fp16"]), engine.sidecar_of(plan))
    with pytest.raises(UserError, match="not the plan of"):
        engine.read_sidecar(plan)


@rtx
def test_a_plan_of_another_version_or_gpu_says_what_to_build(
    plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    sidecar = engine.read_sidecar(plans["fp32"])
    monkeypatch.setattr(cuda, "device", lambda: cuda.Device("A GPU", "90", "13.0"))
    assert engine.obstacle(sidecar) is None
    assert "build it again" in str(engine.obstacle({**sidecar, "version": "1.2.0.1"}))
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.13.0"))
    other = {**sidecar, "backend": "tensorrt", "version": "10.13.0", "gpu": {"sm": "87"}}
    assert "built for SM 87, this GPU is SM 90" in str(engine.obstacle(other))


@rtx
def test_what_tensorrt_refuses_comes_with_its_own_words(exported: Path, tmp_path: Path) -> None:
    _, module = engine.backend("rtx")
    with pytest.raises(UserError, match=r"--shapes: TensorRT refuses \[8, 1, 1\].*\w"):
        trt.build(module, exported / "student.onnx", (8, 1, 1))
    proto = onnx_file.read(exported / "student.onnx")
    node = next(n for n in proto.graph.node if n.op_type == "Relu")
    node.op_type, node.name = "Frobnicate", "the_odd_one"
    path = tmp_path / "odd.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(UserError, match="cannot parse it.*Frobnicate"):
        trt.build(module, path, (1, 1, 8))


@rtx
def test_onnx_runtimes_cpu_int8_is_refused_by_name_not_by_a_crash(
    exported: Path, tmp_path: Path
) -> None:
    from exporters import quantize

    proto = quantize.to_int8(
        onnx_file.read(exported / "student.onnx"), np.load(exported / "calibration.npy")[:16]
    )
    onnx.save(proto, tmp_path / "cpu.onnx")
    with pytest.raises(UserError, match=r"cpu\.onnx: TensorRT cannot"):
        trt.build(engine.backend("rtx")[1], tmp_path / "cpu.onnx", (1, 1, 8))


def test_full_tensorrt_that_is_missing_old_or_without_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cuda, "device", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unavailable, match=r"pip install '\.\[trt\]'.*--backend rtx"):
        engine.backend("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(Unavailable, match=r"10\.9\.0\.34 is older than 10\.12"):
        engine.backend("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
    with pytest.raises(Unavailable, match="no CUDA device"):
        engine.backend("tensorrt")


@pytest.mark.parametrize("text", ["8,1,1", "1,1", "0,1,8", "a,b,c", "1,8,4"])
def test_shapes_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shapes"):
        trt.parse_shapes(text)


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--backend", "trtx"], "did you mean 'rtx'?"),
        (["--precision", "int8"], "no --calib"),
        (["--precision", "fp32,fp16", "-o", "x.plan"], "one name for 2"),
    ],
)
def test_a_users_mistake_is_one_line_and_exit_2(
    argv: list[str], said: str, exported: Path, command: Command
) -> None:
    done = command("exporters.trt", exported / "student.onnx", *argv, torch=False)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1


@rtx
def test_a_foreign_network_becomes_an_engine_without_torch(
    light: Path, tmp_path: Path, command: Command
) -> None:
    plan = tmp_path / "light.plan"
    done = command("exporters.trt", light, "-o", plan, "--backend", "rtx", torch=False)
    assert done.returncode == 0, done.stderr
    assert engine.read_sidecar(plan)["shapes"] == [1, 1, 1]


@pytest.mark.gpu
@pytest.mark.skipif(cuda.device() is None, reason="no CUDA device")
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_agrees_with_its_onnx(precision: str, exported: Path, tmp_path: Path) -> None:
    source = exported / "student.onnx"
    calibration = np.load(exported / "calibration.npy")
    plan, _ = trt.make(source, tmp_path / "s.plan", precision, calibration=calibration)
    session = trt.TrtSession(plan)
    x = np.load(exported / "reference.npz")["x"]
    a, b = inputs.run(OrtSession(source, 1), x), inputs.run(session, x)
    assert agreement.row(plan, session, a, b, agreement.Gates())["verdict"] == "PASS"
