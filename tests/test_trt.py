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

from exporters.artifact import agreement, inputs, onnx_file
from exporters.artifact.session import Unavailable
from exporters.device.compiled_cache import sidecar_path
from exporters.ort.session import OrtSession
from exporters.trt import build, convert, driver
from exporters.trt.build import Options
from exporters.trt.plan import MODULES, backend, obstacle, read_sidecar, system
from exporters.trt.session import TrtSession
from pipeline.core.errors import UserError

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
        sidecar = read_sidecar(plan)
        assert sidecar["precision"] == sidecar["notes"]["precision"] == precision
        assert sidecar["backend"] == "rtx" and f"rtx{sidecar['version'][:3]}" in plan.name
        assert sidecar["shapes"] == [1, 1, 8] and sidecar["input_shape"] == [None, 3, 32, 32]
        assert sidecar["tf32"] is False and sidecar["platform"] == system()
        assert not sidecar["version_compatible"] and not sidecar["hardware_compatible"]
        assert sidecar["timing_cache"] is None and sidecar["optimization_level"] is None
        assert sidecar["onnx"]["opset"] == 18 and sidecar["notes"]["image_size"] == "32"


@rtx
@pytest.mark.skipif(driver.device() is not None, reason="this machine has a GPU")
def test_without_a_gpu_a_plan_says_what_it_is_and_that_it_cannot_run(
    plans: dict[str, Path], command: Command
) -> None:
    done = command("exporters.trt", "info", plans["fp16"], torch=False)
    assert done.returncode == 0 and "precision fp16 (TF32 off), batches [1, 1, 8]" in done.stdout
    assert "runs here: no, no CUDA device" in done.stdout
    with pytest.raises(Unavailable, match="no CUDA device"):
        TrtSession(plans["fp16"])
    source = plans["fp16"].with_name("student.onnx")
    done = command("exporters.parity", source, plans["fp16"], torch=False)
    assert done.returncode == 2 and "no CUDA device" in done.stderr


@rtx
def test_a_plan_without_its_own_sidecar_is_refused(plans: dict[str, Path], tmp_path: Path) -> None:
    plan = Path(shutil.copy(plans["fp32"], tmp_path / "s.plan"))
    with pytest.raises(UserError, match="expected the sidecar of its build"):
        read_sidecar(plan)
    shutil.copy(sidecar_path(plans["fp16"]), sidecar_path(plan))
    with pytest.raises(UserError, match="SHA-256 is not that of"):
        read_sidecar(plan)


@rtx
def test_an_rtx_plan_belongs_to_its_release_and_to_ampere_or_newer(
    plans: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    plan = plans["int8"]
    sidecar = read_sidecar(plan)
    monkeypatch.setattr(driver, "device", lambda: driver.CudaDevice("A GPU", "89", "13.0"))
    assert obstacle(sidecar, plan) is None
    told = str(obstacle({**sidecar, "version": "1.2.0.1"}, plan))
    assert told == (
        f"built by rtx 1.2.0.1, here is {sidecar['version']}: build it here with `python -m exporters.trt "
        f"student.onnx -o {plan} --precision int8 --backend rtx --shapes 1,1,8 --calib IMAGES`"
    )
    assert "built on sea-turtle" in str(obstacle({**sidecar, "platform": "sea-turtle"}, plan))
    monkeypatch.setattr(driver, "device", lambda: driver.CudaDevice("Old", "75", "13.0"))
    assert "built for SM 80 and newer, this GPU is SM 75" in str(obstacle(sidecar, plan))


@rtx
@pytest.mark.parametrize(
    "argv",
    [
        ["--timing-cache", "t.cache"],
        ["--version-compatible"],
        ["--hardware-compatible"],
        ["--optimization-level", "4"],
    ],
)
def test_what_rtx_lacks_is_refused_by_name(
    argv: list[str], light: Path, tmp_path: Path, command: Command
) -> None:
    done = command("exporters.trt", light, "-o", tmp_path / "p.plan", "--backend", "rtx", *argv)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert f"{argv[0]}: " in done.stderr and "--backend tensorrt" in done.stderr
    assert not list(tmp_path.iterdir())


IMAGE = (3, 32, 32)


@rtx
def test_a_profile_out_of_order_comes_with_tensorrts_own_words(exported: Path) -> None:
    _, module = backend("rtx")
    with pytest.raises(UserError, match=r"TensorRT rejects the batches \[8, 1, 1\]: .*\w"):
        build.EngineBuilder(module, exported / "student.onnx", IMAGE, Options((8, 1, 1))).build()


@rtx
def test_every_unsupported_operator_is_listed_with_its_node(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    odd = [n for n in proto.graph.node if n.op_type == "Relu"][:3]
    for i, node in enumerate(odd):
        node.op_type, node.domain, node.name = "Frobnicate", "acme", f"odd_{i}"
    odd[2].name = ""
    index = list(proto.graph.node).index(odd[2])
    proto.opset_import.append(onnx.helper.make_opsetid("acme", 1))
    (tmp_path / "odd.onnx").write_bytes(proto.SerializeToString())
    done = command("exporters.trt", tmp_path / "odd.onnx", "--backend", "rtx")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "cannot parse 3 of its nodes" in done.stderr
    for named in ("Frobnicate odd_0 (", "Frobnicate odd_1 (", f"Frobnicate #{index} ("):
        assert named in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["odd.onnx"]


@rtx
def test_onnx_runtimes_cpu_int8_is_refused_by_name_not_by_a_crash(
    exported: Path, tmp_path: Path
) -> None:
    from exporters.ort import quantize

    proto = quantize.to_int8(
        onnx_file.read_onnx(exported / "student.onnx"), np.load(exported / "calibration.npy")[:16]
    )
    onnx.save(proto, tmp_path / "cpu.onnx")
    with pytest.raises(UserError, match=r"cpu\.onnx: TensorRT cannot"):
        build.EngineBuilder(backend("rtx")[1], tmp_path / "cpu.onnx", IMAGE, Options()).build()


def test_full_tensorrt_that_is_missing_old_or_without_gpu_is_told(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(driver, "device", lambda: None)
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(Unavailable, match=r"pip install '\.\[trt\]'.*--backend rtx"):
        backend("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="10.9.0.34"))
    with pytest.raises(Unavailable, match=r"got 10\.9\.0\.34; expected 10\.12 or later"):
        backend("tensorrt")
    monkeypatch.setitem(sys.modules, "tensorrt", SimpleNamespace(__version__="11.4.0"))
    with pytest.raises(Unavailable, match="no CUDA device"):
        backend("tensorrt")


@pytest.mark.parametrize("name", ["auto", "rtx", "tensorrt"])
def test_without_any_tensorrt_one_line_names_the_way_to_get_one(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for module in MODULES.values():
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(Unavailable) as told:
        backend(name)
    extras = {"auto": ("trt", "trt-rtx"), "rtx": ("trt-rtx",), "tensorrt": ("trt",)}[name]
    assert [f"pip install '.[{e}]'" in str(told.value) for e in extras] == [True] * len(extras)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    "text", ["8,1,1", "1,1", "0,1,8", "a,b,c", "1,8,4", "1,1,\u0661", "1,1," + "9" * 5000]
)
def test_shapes_out_of_order_are_refused(text: str) -> None:
    with pytest.raises(UserError, match="--shapes"):
        build.parse_shapes(text)


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


QUICK = "squeezenet"
OTHERS = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "shufflenet",
    "vgg19",
    "zfnet512",
)


@rtx
@pytest.mark.parametrize(
    "network",
    [
        QUICK,
        pytest.param("resnet50", marks=pytest.mark.ci),
        *(pytest.param(n, marks=pytest.mark.slow) for n in OTHERS),
    ],
)
def test_a_foreign_network_becomes_an_engine_without_torch(
    network: str, light: Path, tmp_path: Path, command: Command
) -> None:
    plan, source = tmp_path / "light.plan", light.with_name(f"light_{network}.onnx")
    done = command("exporters.trt", source, "-o", plan, "--backend", "rtx", torch=False)
    assert done.returncode == 0 and "fp32 (TF32 off)" in done.stdout, done.stderr
    sidecar, proto = read_sidecar(plan), onnx.load(source)
    assert sidecar["shapes"] == [1, 1, 1] and sidecar["input_shape"] == [1, 3, 224, 224]
    assert sidecar["onnx"]["opset"] == proto.opset_import[0].version
    assert round(sidecar["size_mb"] * 1e6) == plan.stat().st_size
    told = command("exporters.trt", "info", plan, torch=False)
    assert told.returncode == 0 and f"from {source.name}, opset" in told.stdout


def test_every_light_network_of_the_wheel_is_tried(light: Path) -> None:
    found = {p.stem.removeprefix("light_") for p in light.parent.glob("light_*.onnx")}
    assert found == {QUICK, "resnet50", *OTHERS}


@pytest.mark.gpu
@pytest.mark.skipif(driver.device() is None, reason="no CUDA device")
@pytest.mark.parametrize("cuda_graph", [True, False])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_an_engine_agrees_with_its_onnx(
    precision: str, cuda_graph: bool, exported: Path, tmp_path: Path
) -> None:
    source = exported / "student.onnx"
    calibration = np.load(exported / "calibration.npy")
    plan, _ = convert.build_plan(source, tmp_path / "s.plan", precision, calibration=calibration)
    session = TrtSession(plan, cuda_graph)
    x = np.load(exported / "reference.npz")["x"]
    a = inputs.run_batches(OrtSession(source, 1), x)
    for batch in (1, 3, 8, 3):  # each captured once, the last replayed
        b = np.concatenate([session.run(part) for part in np.split(x, range(batch, len(x), batch))])
        assert (
            agreement.parity_row(plan, session, a, b, agreement.Thresholds())["verdict"] == "PASS"
        )
