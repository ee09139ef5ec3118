"""The edge bundle: what is in it, that it runs where nothing of ours is installed, what is refused and how."""

from __future__ import annotations

import ast
import copy
import importlib.util
import json
import os
import platform
import shutil
import subprocess
import sys
import tarfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from PIL import Image

from exporters.artifact import agreement, inputs, onnx_file
from exporters.bench import latency
from exporters.bundle import __main__ as bundle_command
from exporters.bundle import make
from exporters.device import actions, contents, cudart, image, ort, parity, run, runtimes, timing
from exporters.device.builder import Builder
from exporters.device.contents import Bundle
from exporters.device.errors import UserError as Refused
from exporters.device.errors import one_line
from exporters.device.trt import TrtModel
from exporters.ort import quantize
from exporters.ort.session import OrtSession
from pipeline.core import artifacts, errors
from pipeline.data import decoding
from tests import fake_jetson
from tests.conftest import CROP_PCT
from tests.house import ROOT

Command = Callable[..., subprocess.CompletedProcess[str]]
Runner = Callable[..., subprocess.CompletedProcess[str]]
OURS = ("torch", "timm", "onnx", "onnxscript", "pipeline", "exporters", "stages", "benchmarks")
RUNTIMES = ("onnxruntime", "openvino", "tensorrt")
START = """
import runpy, sys
for name in {blocked!r}:
    sys.modules[name] = None
if {fake!r}:
    import importlib.util
    spec = importlib.util.spec_from_file_location("faked", {fake!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
runpy.run_module("bundle.run", run_name="__main__", alter_sys=True)
"""
QUICK = ("--seconds", "0.05")


@pytest.fixture(scope="session")
def made(
    exported: Path, digits: Path, tmp_path_factory: pytest.TempPathFactory, command: Command
) -> Path:
    """A bundle of the student with every precision, made without torch; a path with spaces."""
    out = tmp_path_factory.mktemp("bundles") / "the edge bundle"
    done = command(
        "exporters.bundle", exported / "student.onnx", out, "--calib", digits, torch=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr == "" and done.stdout.count("PASS") == 4
    return out


@pytest.fixture
def copied(made: Path, tmp_path: Path) -> Path:
    """A bundle of this test's own."""
    return Path(shutil.copytree(made, tmp_path / "device bundle"))


@pytest.fixture(scope="session")
def runner() -> Runner:
    """`runner(folder, "--bench")`: bundle.run there, with our packages, torch, timm, onnx and PIL out of reach.

    `only` names the runtimes left; `fake` puts stand-ins for TensorRT and libcudart in their place.
    """

    def start(
        folder: Path,
        *argv: object,
        only: tuple[str, ...] = ("onnxruntime",),
        pillow: bool = False,
        fake: str | None = None,
        **environment: str,
    ) -> subprocess.CompletedProcess[str]:
        blocked = {*OURS, *RUNTIMES, "PIL"} - set(only) - ({"PIL"} if pillow else set())
        stand_in = None if fake is None else str(ROOT / "tests" / "fake_jetson.py")
        code = START.format(blocked=sorted(blocked), fake=stand_in)
        return subprocess.run(
            [sys.executable, "-c", code, *map(str, argv)],
            cwd=folder,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1", "FAKE": fake or "", **environment},
            capture_output=True,
            text=True,
        )

    return start


def refused(done: subprocess.CompletedProcess[str], *said: str, code: int = 2) -> None:
    """One line on stderr with these words, and that exit code."""
    assert done.returncode == code, done.stdout + done.stderr
    assert done.stderr.startswith("bundle.run: error: ") and done.stderr.count("\n") == 1
    for words in said:
        assert words in done.stderr


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """The manifest, changed; hashes of the files as they now are."""
    path = folder / contents.MANIFEST
    manifest = json.loads(path.read_text())
    change(manifest)
    for name, entry in manifest["files"].items():
        entry.update(bytes=(folder / name).stat().st_size, sha256=artifacts.sha256(folder / name))
    path.write_text(json.dumps(manifest))


def test_the_manifest_lists_every_file_and_tells_what_it_was_made_of(
    made: Path, exported: Path
) -> None:
    manifest = artifacts.read_json(made / "manifest.json", contents.SCHEMA)
    there = {p.relative_to(made).as_posix() for p in made.rglob("*") if p.is_file()}
    assert there == {*manifest["files"], "manifest.json"}
    for name, entry in manifest["files"].items():
        assert entry["sha256"] == artifacts.sha256(made / name)
    assert manifest["left_out"] == []
    assert [m["precision"] for m in manifest["models"]] == ["fp32", "fp16", "int8", "int8"]
    origin = manifest["provenance"]
    assert origin["inputs"]["onnx"] == artifacts.sha256(exported / "student.onnx")
    assert origin["calibration"]["images"] == 50 and origin["network"]["method"] == "cakd"
    assert str(Path.home()) not in json.dumps(manifest)
    assert str(exported) not in json.dumps(manifest)


def test_labels_preprocessing_and_answers_are_the_networks_own(made: Path, exported: Path) -> None:
    opened = Bundle.open(made)
    description = json.loads((exported / "student.json").read_text())
    assert opened.labels() == description["classes"]
    assert opened.preprocessing() == description["preprocess"]
    assert opened.preprocessing()["crop_pct"] == CROP_PCT
    x, logits = opened.parity()
    assert x.shape == (16, 3, 32, 32) and x.dtype == np.float32
    assert np.abs(OrtSession(exported / "student.onnx", 1).run(x) - logits).max() < 1e-5
    assert len({row.tobytes() for row in x}) == 16


def test_no_parity_input_was_calibrated_on(exported: Path, digits: Path) -> None:
    source = exported / "student.onnx"
    shown = make.parity_images(source, OrtSession(source, 1), digits, None)
    assert shown.int8 is not None
    seen = {row.tobytes() for row in shown.int8.calibration}
    assert not seen & {row.tobytes() for row in shown.x}


def test_int8_is_signed_for_tensorrt_and_unsigned_for_cpus(made: Path) -> None:
    for runtime, kind in (("trt", np.int8), ("ort", np.uint8), ("ov", np.uint8)):
        proto = onnx_file.read_onnx(made / Bundle.open(made).model(runtime, "int8").file)
        held = {w.name: onnx.numpy_helper.to_array(w) for w in proto.graph.initializer}
        points = [held[n.input[2]] for n in proto.graph.node if n.op_type == "QuantizeLinear"]
        assert points and {p.dtype for p in points} == {np.dtype(kind)}, runtime


def test_the_same_inputs_give_the_same_tar_whatever_its_name(
    exported: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    source, tars = exported / "student.onnx", [tmp_path / f"{n}/edge.tar" for n in "ab"]
    for tar in tars:
        done = command("exporters.bundle", source, tar, "--calib", digits)
        assert done.returncode == 0, done.stderr
    assert tars[0].read_bytes() == tars[1].read_bytes()
    with tarfile.open(tars[0]) as archive:
        entries = archive.getmembers()
    assert [e.name for e in entries] == sorted(e.name for e in entries)
    assert {(e.mtime, e.uid, e.gid, e.uname, e.mode) for e in entries} == {(0, 0, 0, "", 0o644)}
    assert all(e.isfile() and e.name.startswith("edge/") for e in entries)
    assert [p.name for p in tars[0].parent.iterdir()] == ["edge.tar"]


def test_a_tar_runs_once_unpacked(
    exported: Path, tmp_path: Path, command: Command, runner: Runner
) -> None:
    tar = tmp_path / "edge.tar"
    done = command("exporters.bundle", exported / "student.onnx", tar)
    assert done.returncode == 0, done.stderr
    shutil.unpack_archive(tar, tmp_path / "device")
    done = runner(tmp_path / "device" / "edge", "--verify")
    assert done.returncode == 0, done.stderr


def test_without_calibration_there_is_no_int8_and_the_manifest_says_why(
    exported: Path, tmp_path: Path, command: Command, runner: Runner
) -> None:
    out = tmp_path / "out"
    done = command("exporters.bundle", exported / "student.onnx", out)
    assert done.returncode == 0 and "left out: int8 for ort, ov" in done.stdout
    manifest = artifacts.read_json(out / "manifest.json")
    assert {e["reason"] for e in manifest["left_out"]} == {make.NO_CALIB}
    assert not list(out.glob("*int8*")) and manifest["provenance"]["calibration"] is None
    refused(runner(out, "--bench", "--precision", "int8"), "no --calib", "expected fp32, fp16")


def test_a_precision_that_fails_its_gate_is_left_out_with_the_figure(
    exported: Path, damaged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wrong = onnx_file.read_onnx(damaged)
    half = quantize.to_fp16
    monkeypatch.setattr(quantize, "to_fp16", lambda _: half(wrong))
    (tmp_path / "out").mkdir()
    manifest = make.build_bundle(exported / "student.onnx", tmp_path / "out", None, None)
    left = {e["precision"]: e["reason"] for e in manifest["left_out"]}
    assert "dB, fp16 gate 35 dB" in left["fp16"]
    assert not (tmp_path / "out" / "model-fp16.onnx").exists()


def test_a_precision_that_the_runtime_refuses_is_left_out_and_no_path_is_told(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(proto: onnx.ModelProto) -> onnx.ModelProto:
        proto = quantize.fold(proto)
        next(n for n in proto.graph.node if n.op_type == "Relu").op_type = "Frobnicate"
        return proto

    monkeypatch.setattr(quantize, "to_fp16", broken)
    monkeypatch.setattr(
        onnx_file, "write_onnx", lambda p, path: path.write_bytes(p.SerializeToString())
    )
    manifest = make.build_bundle(exported / "student.onnx", tmp_path, None, None)
    assert [m["precision"] for m in manifest["models"]] == ["fp32"]
    assert "Frobnicate" in manifest["left_out"][0]["reason"]
    assert str(tmp_path) not in json.dumps(manifest["left_out"])
    assert not (tmp_path / "model-fp16.onnx").exists()


def test_a_folder_with_too_few_images_for_a_networks_batch_is_told(
    exported: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    for entry in (*proto.graph.input, *proto.graph.output):
        entry.type.tensor_type.shape.dim[0].dim_value = 96
    onnx.save(proto, tmp_path / "s.onnx")
    (tmp_path / "few").mkdir()
    for i in range(3):
        Image.new("RGB", (32, 32), (i, 0, 0)).save(tmp_path / "few" / f"{i}.png")
    for option, folder, said in (
        ("--images", tmp_path / "few", "got 3 images for parity; expected 96"),
        ("--calib", digits, "got 100 images; expected 192 or more"),
    ):
        done = command("exporters.bundle", tmp_path / "s.onnx", tmp_path / "out", option, folder)
        assert done.returncode == 2 and said in done.stderr, done.stderr
    assert not (tmp_path / "out").exists()


def test_a_network_that_answers_nan_is_never_bundled(
    exported: Path, tmp_path: Path, command: Command
) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    weight = next(w for w in proto.graph.initializer if len(w.dims) == 2)
    values = onnx.numpy_helper.to_array(weight) * np.float32(np.nan)
    weight.CopyFrom(onnx.numpy_helper.from_array(values, weight.name))
    onnx.save(proto, tmp_path / "nan.onnx")
    done = command("exporters.bundle", tmp_path / "nan.onnx", tmp_path / "out", torch=False)
    assert done.returncode == 3 and "; not written" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["nan.onnx"]


def test_a_network_without_notes_and_of_fixed_batch_is_bundled_and_says_what_it_lacks(
    light: Path, tmp_path: Path, command: Command, runner: Runner
) -> None:
    done = command("exporters.bundle", light, tmp_path / "out", torch=False)
    assert done.returncode == 3, done.stderr
    assert "parity is UNDECIDED" in done.stderr and not list(tmp_path.iterdir())
    done = command("exporters.bundle", light, tmp_path / "out", "--force", torch=False)
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "out" / "labels.txt").exists()
    done = runner(tmp_path / "out", "--verify", "--precision", "fp32")
    assert done.returncode == 3 and "UNDECIDED" in done.stdout, done.stderr
    assert "is not verified by the bundled logits: model-fp32.onnx: UNDECIDED" in done.stderr
    refused(
        runner(tmp_path / "out", "--image", "x.png", pillow=True), "has no preprocessing metadata"
    )


@pytest.mark.parametrize(
    ("name", "argv", "said"),
    [
        ("out.zip", (), "a name ending in .tar"),
        ("taken", (), "holds photo.jpg, which is not of a bundle"),
        ("file", (), "got a file"),
        ("out", ("--calib", "nowhere"), "nowhere: not a folder"),
        ("out", ("--images", "taken"), "photo.jpg: not a readable image"),
    ],
)
def test_a_makers_mistake_is_one_line_and_nothing_is_written(
    name: str,
    argv: tuple[str, ...],
    said: str,
    exported: Path,
    tmp_path: Path,
    command: Command,
) -> None:
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "photo.jpg").write_bytes(b"precious")
    (tmp_path / "file").write_bytes(b"precious")
    before = sorted(tmp_path.rglob("*"))
    places = [a if a.startswith("--") else tmp_path / a for a in argv]
    done = command("exporters.bundle", exported / "student.onnx", tmp_path / name, *places)
    assert done.returncode == 2 and said in done.stderr and done.stderr.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "taken" / "photo.jpg").read_bytes() == b"precious"


def test_only_a_bundle_and_what_running_it_left_is_replaced(copied: Path) -> None:
    (copied / "cache").mkdir()
    (copied / "cache" / "x.plan").write_bytes(b"")
    bundle_command.check_out(copied)
    (copied / "mine.txt").write_text("")
    with pytest.raises(errors.UserError, match=r"holds mine\.txt"):
        bundle_command.check_out(copied)


@pytest.mark.parametrize("change", ["shape", "crop", "classes"])
def test_notes_of_another_network_are_refused(
    change: str, exported: Path, tmp_path: Path, command: Command
) -> None:
    proto = onnx_file.read_onnx(exported / "student.onnx")
    wrong = {
        "shape": ("image_size", "64"),
        "crop": ("crop", "stretch"),
        "classes": ("classes", "a"),
    }
    key, value = wrong[change]
    onnx.helper.set_model_props(proto, {**onnx_file.read_metadata(proto), key: value})
    onnx.save(proto, tmp_path / "s.onnx")
    done = command("exporters.bundle", tmp_path / "s.onnx", tmp_path / "out", torch=False)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("only", "said"), [("onnxruntime", "onnxruntime "), ("openvino", "openvino ")]
)
def test_a_device_with_one_runtime_verifies_every_precision(
    only: str, said: str, made: Path, runner: Runner
) -> None:
    done = runner(made, "--verify", only=(only,))
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert "files are as the manifest" in lines[0] and len(lines) == 4
    assert all(line.startswith(said) and line.endswith(": PASS") for line in lines[1:])
    assert "fp32 (computes in fp32)" in lines[1] and "int8 (computes in int8)" in lines[3]


@pytest.mark.parametrize("only", ["onnxruntime", "openvino"])
def test_a_bench_tells_its_figures_and_no_percentile_it_cannot_know(
    only: str, made: Path, runner: Runner
) -> None:
    done = runner(made, "--bench", "--precision", "int8", "--json", *QUICK, only=(only,))
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout)
    wall, n = row["wall_ms"], row["wall_ms"]["n"]
    assert row["runtime"].startswith(only) and row["computes_in"] == "int8"
    assert wall["min"] <= wall["p50"] and row["cpu_ms"]["p50"] > 0
    assert (wall["p90"] is not None) == (n >= 100) and (wall["p99"] is not None) == (n >= 1000)
    assert row["load_ms"] > 0 and row["first_ms"] > 0 and row["warm_up"]["seconds"] >= 0.4
    assert row["bundle"]["manifest_sha256"] == artifacts.sha256(made / "manifest.json")


@pytest.mark.parametrize(
    ("version", "off"),
    [("1.18.1", None), ("1.19.2", ["Pad_Fusion"]), ("1.20.1", ["Pad_Fusion"]), ("1.21.0", None)],
)
def test_the_fusion_that_two_versions_of_onnx_runtime_get_wrong_is_off_there(
    version: str, off: list[str] | None, made: Path
) -> None:
    import onnxruntime

    asked = []

    def opened(*args: Any, disabled_optimizers: Any, **kwargs: Any) -> Any:
        asked.append(disabled_optimizers)
        return onnxruntime.InferenceSession(
            *args, disabled_optimizers=disabled_optimizers, **kwargs
        )

    module = SimpleNamespace(
        __version__=version,
        InferenceSession=opened,
        SessionOptions=onnxruntime.SessionOptions,
    )
    found = ort.OrtModel(module, made / "model-fp32.onnx", 1)
    x, logits = Bundle.open(made).parity()
    assert parity.compare_logits(logits, found.run(x), "fp32")[1] == "PASS" and asked == [off]


def test_the_bench_in_words(made: Path, runner: Runner) -> None:
    done = runner(made, "--bench", *QUICK)
    assert done.returncode == 0 and "p50" in done.stdout and "load " in done.stdout, done.stderr


def test_the_command_line_as_it_is_typed(made: Path) -> None:
    line = [sys.executable, "-B", *make.COMMANDS["verify"].split()[1:]]
    done = subprocess.run(line, cwd=made, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("PASS") == 3, done.stderr
    assert not list(made.rglob("__pycache__"))


@pytest.mark.parametrize("only", ["onnxruntime", "openvino"])
def test_a_picture_is_classified_as_the_pipeline_would(
    only: str, made: Path, exported: Path, tmp_path: Path, runner: Runner
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 40, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a picture.png")
    line = ("--image", tmp_path / "a picture.png", "--json")
    done = runner(made, *line, only=(only,), pillow=True)
    assert done.returncode == 0, done.stderr
    top = json.loads(done.stdout)["rows"][0]["top"]
    (tmp_path / "folder").mkdir()
    shutil.copy(tmp_path / "a picture.png", tmp_path / "folder")
    network = OrtSession(exported / "student.onnx", 1)
    logits = network.run(inputs.images_from_folder(tmp_path / "folder", network, 1))[0]
    assert [a["class"] for a in top] == np.argsort(-logits)[:5].tolist()
    shares = np.exp(logits) / np.exp(logits).sum()
    assert top[0]["probability"] == pytest.approx(float(shares.max()), abs=1e-3)
    assert top[0]["label"] == f"digit {top[0]['class']}, drawn"


def test_any_picture_is_prepared_bit_for_bit_as_in_training(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    rgba = generator.integers(0, 256, (30, 50, 4), np.uint8)
    deep = generator.integers(0, 65536, (30, 50)).astype(np.uint16)
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds = {
        "rgba.png": Image.fromarray(rgba),
        "grey.png": Image.fromarray(rgba[..., 0]),
        "deep.png": Image.fromarray(deep),
        "palette.gif": Image.fromarray(rgba[..., :3]).quantize(16),
        "turned.jpg": Image.fromarray(rgba[..., :3]),
    }
    notes = {"image_size": 24, "interpolation": "bicubic", "crop": image.CROP, "crop_pct": 1.0}
    notes |= {"mean": [0.0] * 3, "std": [1 / 255] * 3}
    for name, saved in kinds.items():
        saved.save(tmp_path / name, **({"exif": turned} if name == "turned.jpg" else {}))
        ours = decoding.square_rgb(Image.open(tmp_path / name), 24)
        x = image.read_image(tmp_path / name, notes)[0].transpose(1, 2, 0)
        assert np.array_equal(x.round().astype(np.uint8), ours), name


def test_a_picture_that_is_none_and_a_missing_pillow_are_told(
    made: Path, tmp_path: Path, runner: Runner
) -> None:
    refused(runner(made, "--image", "x.jpg"), "needs Pillow", "`pip install pillow`")
    refused(runner(made, "--image", "x.jpg", pillow=True), "--image x.jpg", "No such file")
    (tmp_path / "y.jpg").write_bytes(b"no picture")
    refused(runner(made, "--image", tmp_path / "y.jpg", pillow=True), "y.jpg: cannot be read")


def test_a_damaged_file_is_named_before_anything_runs(copied: Path, runner: Runner) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    for name in manifest["files"]:
        if name.startswith("bundle/"):
            continue
        path = copied / name
        whole = path.read_bytes()
        for broken, said in (
            (whole[:-1], "damaged: "),
            (bytes([whole[0] ^ 1]) + whole[1:], "got SHA-256"),
            (None, "No such file"),
        ):
            path.unlink()
            if broken is not None:
                path.write_bytes(broken)
            with pytest.raises(Refused, match=said) as told:
                Bundle.open(copied)
            assert name in str(told.value)
            path.write_bytes(whole)
    (copied / "model-int8-trt.onnx").write_bytes(b"")
    for action in (("--verify",), ("--bench",), ("--image", "x.jpg")):
        refused(
            runner(copied, *action), "model-int8-trt.onnx: damaged: got 0 bytes", "copy the bundle"
        )


def test_an_altered_runner_tells_on_itself(copied: Path, runner: Runner) -> None:
    with (copied / "bundle" / "parity.py").open("a") as file:
        file.write("FP32_REL = 1e9\n")
    refused(runner(copied, "--verify"), "parity.py: damaged")


def test_other_answers_than_the_makers_are_exit_3(copied: Path, runner: Runner) -> None:
    logits = np.load(copied / contents.LOGITS)
    np.save(copied / contents.LOGITS, logits + np.float32(0.005) * logits.std(axis=0).mean())
    rewritten(copied, lambda _: None)
    done = runner(copied, "--verify", "--json")
    refused(done, "is not verified by the bundled logits: model-fp32.onnx: FAIL, max abs", code=3)
    verdicts = [row["verdict"] for row in json.loads(done.stdout)["rows"]]
    assert verdicts == ["FAIL", "PASS", "PASS"]


def damage(value: Any, where: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Every place in a JSON value with every kind of wrong value, or none (`...`)."""
    inside: Any = ()
    if isinstance(value, dict):
        inside = value.items()
    elif isinstance(value, list):
        inside = enumerate(value)
    for key, part in inside:
        for wrong in (..., None, True, -1, "x", "../x", [], {}, [1], 2.5):
            yield (*where, key), wrong
        yield from damage(part, (*where, key))


def test_a_damaged_manifest_never_ends_in_a_traceback(made: Path) -> None:
    manifest = json.loads((made / "manifest.json").read_text())
    manifest = {k: v for k, v in manifest.items() if k not in ("commands", "provenance", "parity")}
    manifest["files"] = dict(list(manifest["files"].items())[-6:])
    left = {"precision": "int8", "runtimes": ["ov"], "reason": "why"}
    manifest["left_out"] = [left]
    tried = refusals = 0
    for where, wrong in damage(manifest):
        document = copy.deepcopy(manifest)
        parent: Any = document
        for key in where[:-1]:
            parent = parent[key]
        if wrong is ...:
            del parent[where[-1]]
        else:
            parent[where[-1]] = wrong
        tried += 1
        try:
            contents._parse(made, document, "")
        except (AttributeError, KeyError, TypeError, ValueError):
            refusals += 1
    assert tried > 400 and refusals > 0.5 * tried


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[]", "schema: got None"),
        ('{"schema": "cakd.bundle/9"}', "got 'cakd.bundle/9'; expected 'cakd.bundle/1'"),
        ('{"schema": "cakd.bundle/1"}', "not a manifest (KeyError: 'files')"),
        (
            '{"schema": "cakd.bundle/1", "files": {"../../etc/passwd": {"bytes": 1, "sha256": ""}}}',
            "leads out of the bundle",
        ),
    ],
)
def test_a_damaged_manifest_is_told(text: str, said: str, copied: Path, runner: Runner) -> None:
    (copied / "manifest.json").write_text(text)
    refused(runner(copied, "--verify"), "manifest.json: ", said)


def test_a_missing_manifest_is_told(copied: Path, runner: Runner) -> None:
    (copied / "manifest.json").unlink()
    refused(runner(copied, "--verify"), "run in the folder that holds manifest.json")


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        ((), "one of the arguments --verify --bench --bench-all --image is required"),
        (("--verify", "--bench"), "not allowed with"),
        (("--bench", "--precision", "fp61"), "invalid choice: 'fp61'"),
        (("--bench", "--runtime", "tflite"), "invalid choice: 'tflite'"),
        (("--bench", "--seconds", "0"), "--seconds: got 0; expected more than 0"),
        (("--bench", "--threads", "4096"), "--threads: got 4096; expected 1 to"),
        (("--bench", "--threads", "0"), "--threads: got 0; expected 1 to"),
        (("--bench", "--runtime", "ov"), "openvino is not installed ("),
        (("--bench", "--runtime", "trt"), "JetPack brings it"),
    ],
)
def test_a_mistake_on_the_device_is_one_line_and_exit_2(
    argv: tuple[str, ...], said: str, made: Path, runner: Runner
) -> None:
    refused(runner(made, *argv), said)


def test_a_device_without_any_runtime_is_told_how_to_get_one(made: Path, runner: Runner) -> None:
    done = runner(made, "--verify", only=())
    refused(
        done, "`pip install onnxruntime`", "`pip install openvino`", "tensorrt is not installed"
    )


def test_a_device_without_numpy_is_told(made: Path) -> None:
    code = START.format(blocked=["numpy"], fake=None)
    line = [sys.executable, "-B", "-c", code, "--verify"]
    done = subprocess.run(line, cwd=made, capture_output=True, text=True)
    refused(done, "NumPy: not importable (", "expected 1.21 or later", "`pip install numpy`")


def test_a_read_only_folder_is_enough_and_nothing_is_written_there(
    copied: Path, runner: Runner
) -> None:
    before = sorted(copied.rglob("*"))
    try:
        for path in (*before, copied):
            path.chmod(0o555 if path.is_dir() else 0o444)
        for action in (("--verify",), ("--bench", *QUICK)):
            done = runner(copied, *action)
            assert done.returncode == 0, done.stderr
        assert sorted(copied.rglob("*")) == before
    finally:
        for path in (copied, *copied.rglob("*")):
            path.chmod(0o755)


def test_tensorrt_verifies_every_precision_on_the_engine_it_builds(
    copied: Path, runner: Runner
) -> None:
    both = ("onnxruntime", "tensorrt")
    done = runner(copied, "--verify", only=both, fake="")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("tensorrt 10.3.0") == done.stdout.count("PASS") == 3
    assert done.stderr.count("building the engine of model-") == 3
    kept = {p.name for p in (copied / "cache").iterdir()}
    assert "model-int8-trt.trt10.3.0-sm87.plan" in kept and len(kept) == 6
    noted = json.loads((copied / "cache/model-fp16.trt10.3.0-sm87.plan.json").read_text())
    assert noted["tensorrt"] == "10.3.0" and noted["sm"] == 87 and noted["multiprocessors"] == 8
    assert noted["onnx_sha256"] == artifacts.sha256(copied / "model-fp16.onnx")
    again = runner(copied, "--verify", only=both, fake="")
    assert again.returncode == 0 and again.stderr == ""


def test_an_engine_of_another_version_gpu_or_file_is_built_again(
    copied: Path, runner: Runner
) -> None:
    line = ("--bench", *QUICK, "--json")
    both = ("onnxruntime", "tensorrt")
    first = json.loads(runner(copied, *line, only=both, fake="").stdout)
    assert first["build_s"] >= 0 and first["threads"] is None
    second = json.loads(runner(copied, *line, only=both, fake="").stdout)
    assert second["build_s"] is None
    for change in ({"FAKE_VERSION": "10.7.0"}, {"FAKE_MINOR": "9"}):
        done = runner(copied, *line, only=both, fake="", **change)
        assert "building" in done.stderr and json.loads(done.stdout)["build_s"] is not None
    plan = copied / "cache" / "model-fp32.trt10.3.0-sm87.plan"
    plan.write_bytes(plan.read_bytes()[:-1])
    assert "building" in runner(copied, *line, only=both, fake="").stderr
    assert plan.read_bytes() == (copied / "model-fp32.onnx").read_bytes()


def test_batches_of_any_size_share_the_engines_buffers_and_lose_none(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fake_jetson, "CUDA", fake_jetson.Cudart())
    monkeypatch.setattr(cudart, "_load", fake_jetson.CUDA.library)
    engine = TrtModel(fake_jetson.tensorrt(), made / "model-fp32.onnx", "fp32", tmp_path)
    x, logits = Bundle.open(made).parity()
    for size in (1, 3, 2, 8, 16, 1):
        assert np.abs(engine.run(x[:size]) - logits[:size]).max() < 1e-5
        assert len(fake_jetson.CUDA.memory) == 2


@pytest.mark.parametrize("name", ["ort", "ov"])
@pytest.mark.parametrize("threads", [None, 2])
def test_a_runtime_gets_the_threads_asked_for(name: str, threads: int | None, made: Path) -> None:
    args = Namespace(threads=threads, cache=None)
    opened = actions.Opened(Bundle.open(made), name, runtimes.import_runtime(name), "fp32", args)
    inner: Any = opened.model
    got = (
        inner._session.get_session_options().intra_op_num_threads
        if name == "ort"
        else inner._compiled.get_property("INFERENCE_NUM_THREADS")
    )
    assert got == opened.facts["threads"] == (threads or 1)


def test_tensorrt_without_a_place_to_keep_the_engine_runs_and_says_so(
    copied: Path, runner: Runner, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where a folder belongs")
    line = ("--verify", "--precision", "fp32", "--cache", tmp_path / "cache")
    done = runner(copied, *line, only=("onnxruntime", "tensorrt"), fake="")
    assert done.returncode == 0 and ".plan is not cached" in done.stderr
    assert not (copied / "cache").exists()


@pytest.mark.skipif(
    importlib.util.find_spec("openvino") is None, reason="the openvino extra is not installed"
)
def test_openvino_keeps_what_it_compiled_only_where_a_folder_is_given(
    copied: Path, runner: Runner, tmp_path: Path
) -> None:
    line = ("--verify", "--precision", "fp32", "--cache", tmp_path / "cache")
    assert runner(copied, "--verify", "--precision", "fp32", only=("openvino",)).returncode == 0
    assert not (copied / "cache").exists()
    for _ in range(2):
        done = runner(copied, *line, only=("openvino",))
        assert done.returncode == 0 and "PASS" in done.stdout, done.stderr
    assert [p.suffix for p in sorted((tmp_path / "cache").iterdir())] == [".blob", ".json"]


@pytest.mark.parametrize(
    ("broken", "said"),
    [
        ("Builder", "TensorRT cannot start: the log's words on Builder"),
        ("parse_from_file", "cannot parse it: the parser's words on Frobnicate"),
        ("add_optimization_profile", "rejects the batches [1, 1, 8]: the log's words"),
        ("build_serialized_network", "cannot build it: the log's words on build_serialized"),
        ("deserialize_cuda_engine", "does not load: the log's words on deserialize"),
        ("create_execution_context", "no execution context: the log's words on create"),
        ("dtype", "expected one float32 image input"),
        ("set_input_shape", "TensorRT rejects (8, 3, 32, 32)"),
        ("set_tensor_address", "rejects its buffer: the log's words"),
        ("execute_async_v3", "the engine failed to run: the log's words"),
        ("cudaMalloc", "cudaMalloc: got 2, words of 2"),
        ("driver", "cudaGetDeviceCount: got 35, words of 35"),
        ("no device", "got 0 CUDA devices"),
    ],
)
def test_what_tensorrt_or_cuda_refuses_comes_with_its_own_words(
    broken: str, said: str, made: Path, tmp_path: Path, runner: Runner
) -> None:
    line = ("--verify", "--runtime", "trt", "--cache", tmp_path, "--precision", "fp32")
    done = runner(made, *line, only=("onnxruntime", "tensorrt"), fake=broken)
    told = done.stderr.splitlines()
    assert done.returncode == 2 and said in told[-1], done.stderr
    assert len(told) <= 2 and "only a warning" not in done.stderr


def test_an_older_tensorrt_threads_for_a_gpu_and_auto_without_a_device(
    made: Path, tmp_path: Path, runner: Runner
) -> None:
    both, trt = ("onnxruntime", "tensorrt"), ("--bench", "--runtime", "trt", "--cache", tmp_path)
    old = runner(made, *trt, only=both, fake="", FAKE_VERSION="8.6.2")
    refused(old, "got TensorRT 8.6.2; expected 10.3 or later")
    refused(runner(made, *trt, "--threads", 1, only=both, fake=""), "TensorRT runs on the GPU")
    done = runner(made, "--verify", only=both, fake="driver")
    assert done.returncode == 0 and done.stdout.count("onnxruntime") == 3, done.stderr


def test_a_device_without_the_cuda_library_is_told_where_it_was_looked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def absent(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cudart.ctypes, "CDLL", absent)
    with pytest.raises(Refused, match=r"no CUDA runtime library \(libcudart\.so\.12, "):
        cudart.Cuda()


def test_what_a_device_measured_goes_into_a_report_of_several_machines(
    copied: Path, runner: Runner, command: Command, tmp_path: Path
) -> None:
    found = runner(copied, "--bench", "--seconds", "0.2", "--precision", "int8", "--json")
    assert found.returncode == 0, found.stderr
    path = tmp_path / "pi.json"
    path.write_text(found.stdout)
    done = command("stages.report", "--merge", path, "--out", tmp_path / "edge")
    assert done.returncode == 0, done.stderr
    p50 = json.loads(found.stdout)["wall_ms"]["p50"]
    told = (tmp_path / "edge" / "edge.md").read_text()
    row = next(line for line in told.splitlines() if line.startswith("| ort-int8 |"))
    assert f"| {p50:.3g}" in row and "| int8 |" in row
    assert "not measured" in row  # the teacher
    assert platform.machine().replace("_", r"\_") in told


def test_of_a_long_message_the_end_is_kept(made: Path, tmp_path: Path) -> None:
    import onnxruntime

    assert one_line("a\n b") == "a b" and one_line("") == "str"
    assert one_line("x" * 400 + " the reason", 20).endswith("x the reason")
    proto = onnx_file.read_onnx(made / "model-fp32.onnx")
    proto.ir_version = 999
    (tmp_path / "newer.onnx").write_bytes(proto.SerializeToString())
    with pytest.raises(Refused, match=r"newer\.onnx: .*IR version: 999.*newer onnxruntime"):
        ort.OrtModel(onnxruntime, tmp_path / "newer.onnx", 1)


CUDART = """
#include <stdlib.h>
#include <string.h>
int cudaGetDeviceCount(int *n) { *n = 1; return 0; }
int cudaDeviceGetAttribute(int *v, int a, int d) { *v = a == 16 ? 8 : 7; return d; }
int cudaMalloc(void **p, size_t n) { *p = malloc(n); return *p == 0; }
int cudaFree(void *p) { free(p); return 0; }
int cudaMemcpyAsync(void *to, const void *from, size_t n, int kind, void *s) {
  if (s != (void *)0x7fff00001234 || (kind != 1 && kind != 2)) return 1;
  memcpy(to, from, n);
  return 0;
}
int cudaStreamCreate(void **s) { *s = (void *)0x7fff00001234; return 0; }
int cudaStreamSynchronize(void *s) { return s != (void *)0x7fff00001234; }
static void *graph = (void *)0x7fff00005678, *ready = (void *)0x7fff00009abc;
int cudaStreamBeginCapture(void *s, int mode) { return mode != 1 || s != (void *)0x7fff00001234; }
int cudaStreamEndCapture(void *s, void **g) { *g = graph; return s != (void *)0x7fff00001234; }
int cudaGraphInstantiateWithFlags(void **e, void *g, unsigned long long flags) {
  *e = ready;
  return g != graph || flags;
}
int cudaGraphDestroy(void *g) { return g != graph; }
int cudaGraphLaunch(void *e, void *s) { return e != ready || s != (void *)0x7fff00001234; }
int cudaEventCreate(void **e) { static char *made = (char *)0x7fff0000def0; *e = made += 16; return 0; }
int cudaEventRecord(void *e, void *s) {
  return (size_t)e < 0x7fff0000def0 || s != (void *)0x7fff00001234;
}
int cudaEventElapsedTime(float *ms, void *a, void *b) { *ms = ((char *)b - (char *)a) / 64.0f; return 0; }
const char *cudaGetErrorString(int e) { return "words"; }
"""


@pytest.mark.skipif(cudart._load() is None, reason="no libcudart")
def test_the_installed_libcudart_has_every_call() -> None:
    library = cudart._load()
    assert all(hasattr(library, name) for name in cudart.SIGNATURES)


@pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")
def test_the_calls_of_libcudart_have_the_types_of_c(tmp_path: Path) -> None:
    """Over a compiled library: an address or a handle cut to 32 bits would crash or fail here."""
    source, library = tmp_path / "cudart.c", tmp_path / "libcudart.so.12"
    source.write_text(CUDART)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    code = (
        "import numpy as np\nfrom exporters.device.cudart import Cuda\n"
        "cuda = Cuda(); stream = cuda.stream(); x = np.arange(5e6, dtype=np.float32)\n"
        "there = cuda.allocate(x.nbytes); back = np.zeros_like(x)\n"
        "cuda.upload(there, x, stream); cuda.download(back, there, stream); cuda.wait(stream)\n"
        "cuda.free(there); assert (x == back).all() and cuda.device()['multiprocessors'] == 8\n"
        "ran = []; graph = cuda.capture(stream, lambda: ran.append(1)); cuda.launch(graph, stream)\n"
        "began, ended = cuda.event(), cuda.event(); cuda.record(began, stream)\n"
        "cuda.record(ended, stream); assert cuda.elapsed_ms(began, ended) == 0.25 and ran == [1]\n"
    )
    environment = {**os.environ, "LD_LIBRARY_PATH": str(tmp_path)}
    line = [sys.executable, "-c", code]
    done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx") is None, reason="the trt-rtx extra is not installed"
)
def test_a_real_builder_takes_every_file_meant_for_tensorrt(made: Path) -> None:
    """TensorRT-RTX builds without a GPU by the calls that the runner makes."""
    import tensorrt_rtx

    opened = Bundle.open(made)
    for precision in contents.PRECISIONS:
        model = made / opened.model("trt", precision).file
        assert Builder(tensorrt_rtx, model).build()
    unsigned = made / opened.model("ort", "int8").file
    with pytest.raises(Refused, match=r"model-int8-cpu\.onnx: TensorRT cannot"):
        Builder(tensorrt_rtx, unsigned).build()


def test_the_runner_is_python_3_8_with_the_standard_library_and_numpy(made: Path) -> None:
    allowed = {*sys.stdlib_module_names, "numpy"}
    decoder = Path(decoding.__file__)
    for path in (*sorted((ROOT / "exporters" / "device").glob("*.py")), decoder):
        assert (made / "bundle" / path.name).read_bytes() == path.read_bytes()
        tree = ast.parse(path.read_text(), feature_version=(3, 8))
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level:
                names = [node.module or ""]
            extra = {name.split(".")[0] for name in names} - allowed
            assert extra <= ({"PIL"} if path == decoder else set()), path
            if isinstance(node, ast.ImportFrom):
                assert node.level < 2, f"{path} leaves the package"


@pytest.mark.parametrize("precision", ["fp32", "fp16", "int8"])
def test_the_gates_on_the_device_are_those_of_the_maker(precision: str) -> None:
    generator = np.random.default_rng(0)
    offsets = 3 * np.arange(10)  # shared by all images: it must earn nothing
    reference = (generator.standard_normal((16, 10)) + offsets).astype(np.float32)
    constant = np.full_like(reference, 0.5)
    noise = generator.standard_normal(reference.shape).astype(np.float32)
    answers = [reference + noise * np.float32(10**e) for e in np.linspace(-5, 0, 40)]
    answers += [reference, np.full_like(reference, np.nan), constant]
    seen = set()
    for a, b in [(reference, b) for b in answers] + [(constant, constant), (constant, reference)]:
        verdict = agreement.compare_outputs(a, b, precision, agreement.Thresholds())[1]
        assert parity.compare_logits(a, b, precision)[1] == verdict
        seen.add(verdict)
    assert seen == {"PASS", "FAIL", "UNDECIDED"}


@pytest.mark.parametrize("n", [1, 99, 100, 999, 1000])
def test_a_percentile_on_the_device_needs_as_many_calls_as_the_makers(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = np.random.default_rng(0)
    wall, cpu = (generator.random(n).tolist() for _ in range(2))
    monkeypatch.setattr(timing, "run_block", lambda *_, **__: timing.Block(wall, cpu))
    theirs = latency.summarise_calls([latency.Block(wall, cpu)])
    found = timing.time_calls(lambda x: x, [np.zeros(1, np.float32)] * 4, 1)
    assert theirs["wall_ms"].pop("p50_ci") is None  # of one block
    assert [found[k] for k in ("wall_ms", "cpu_ms")] == [theirs[k] for k in ("wall_ms", "cpu_ms")]
    assert found["wall_ms"]["n"] == n and (found["wall_ms"]["p99"] is None) == (n < 1000)


def test_the_warm_up_ends_when_it_is_stable_and_else_the_row_is_noisy(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    x = [np.zeros(1, np.float32)] * 4
    for medians, stable, blocks in (([5, 1, 1.01, 1.02], True, 4), ([1, 2] * 40, False, 3)):
        turns = iter([*medians, *[1] * 99])
        monkeypatch.setattr(timing, "WARM_UP_SECONDS", 60 if stable else 0)
        calls: list[float] = []
        monkeypatch.setattr(
            timing,
            "run_block",
            lambda *_, c=calls, t=turns, **__: (c.append(1), timing.Block([next(t)], [1.0]))[1],
        )
        found = timing.time_calls(lambda x: x, x, 1)
        assert found["warm_up"]["stable"] is stable and len(calls) == blocks + 1
        assert timing.noise_flags(1.0, found["warm_up"]["stable"], 1) == (
            [] if stable else ["warm-up not stable"]
        )
    assert timing.noise_flags(0.5, True, 1) == ["cpu/wall 0.50 below 0.9"]
    with pytest.raises(ValueError, match="3 input buffers"):
        timing.time_calls(lambda x: x, x[:3], 1)


def test_precisions_runtimes_and_help_name_the_same_things() -> None:
    assert tuple(runtimes.MODULES) == contents.RUNTIMES
    assert {v.precision for v in make.VARIANTS} == set(contents.PRECISIONS)
    text = run.parser().format_help()
    for command in make.COMMANDS.values():
        for option in [word for word in command.split() if word.startswith("--")]:
            assert option in text
