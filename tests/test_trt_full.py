"""Full TensorRT on a GPU that is not here: what is asked of it, what each failure is told as, what runs where."""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from exporters.artifact.session import Unavailable
from exporters.device import builder, cudart
from exporters.device.compiled_cache import sidecar_path
from exporters.trt import __main__ as trt_command
from exporters.trt import convert, driver
from exporters.trt.build import Options
from exporters.trt.plan import read_sidecar
from exporters.trt.session import TrtSession
from pipeline.core.errors import GateFailed, UserError
from tests import fake_tensorrt
from tests.fake_tensorrt import GPU, Fake, Flags, Level, Verbosity

Make = Callable[..., dict[str, Any]]


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Fake]:
    """`machine(version=..., fails={...}, gpu=...)`: from here on the packages and the GPU of that machine."""

    def become(*fails: str, version: str = "11.4.0.106", gpu: driver.CudaDevice = GPU) -> Fake:
        fake = Fake(version, frozenset(fails))
        fake.install(monkeypatch, gpu)
        return fake

    return become


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A small network with a free batch, 3 channels, 8 px."""
    return network(tmp_path / "net.onnx", "Relu", "Relu")


def network(path: Path, *operators: str) -> Path:
    h, kind = onnx.helper, onnx.TensorProto.FLOAT
    names = ["image", *(f"t{i}" for i in range(len(operators) - 1)), "logits"]
    nodes = [
        h.make_node(operator, [a], [b], f"node_{i}", domain="" if operator == "Relu" else "acme")
        for i, (operator, (a, b)) in enumerate(zip(operators, pairwise(names), strict=True))
    ]
    shape = ["batch", 3, 8, 8]
    graph = h.make_graph(
        nodes,
        "net",
        [h.make_tensor_value_info("image", kind, shape)],
        [h.make_tensor_value_info("logits", kind, shape)],
    )
    opsets = [h.make_opsetid("", 18), h.make_opsetid("acme", 1)]
    onnx.save(h.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def made(source: Path, **options: Any) -> dict[str, Any]:
    return convert.build_plan(
        source, source.with_suffix(".plan"), "fp32", "tensorrt", Options(**options)
    )[1]


def test_the_network_is_strongly_typed_without_tf32_and_with_the_profile(
    machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine()
    sidecar = made(source, shapes=(1, 2, 16))
    assert ("flags", 1 << 1) in fake.asked
    profile = ("profile", "image", (1, 3, 8, 8), (2, 3, 8, 8), (16, 3, 8, 8))
    assert profile in fake.asked
    settings = {"flags": set(), "workspace": builder.WORKSPACE}
    settings["profiling_verbosity"] = Verbosity.DETAILED
    assert ("settings", settings) in fake.asked
    assert sidecar["tf32"] is False and sidecar["shapes"] == [1, 2, 16]
    assert sidecar["gpu"]["sm"] == "90" and sidecar["version"] == "11.4.0.106"


def test_every_option_reaches_tensorrt_and_the_sidecar(
    machine: Callable[..., Fake], source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fake = machine()
    sidecar = made(source, version_compatible=True, hardware_compatible=True, optimization_level=0)
    settings = next(entry[1] for entry in fake.asked if entry[0] == "settings")
    assert settings["flags"] == {Flags.VERSION_COMPATIBLE}
    assert settings["hardware_compatibility_level"] == Level.AMPERE_PLUS
    assert settings["builder_optimization_level"] == 0
    assert sidecar["version_compatible"] and sidecar["hardware_compatible"]
    assert sidecar["optimization_level"] == 0
    plan = source.with_suffix(".plan")
    trt_command.print_info(trt_command.info_parser().parse_args([str(plan)]))
    told = capsys.readouterr().out
    for words in ("TF32 off", "version compatible", "hardware compatible", "optimization level 0"):
        assert words in told
    assert "runs here: yes" in told


@pytest.mark.parametrize(
    ("verdict", "argv", "written"),
    [
        ("PASS", [], True),
        ("skipped", [], True),
        ("FAIL", ["--force"], False),
        ("UNDECIDED", [], False),
        ("UNDECIDED", ["--force"], True),
    ],
)
def test_a_plan_is_written_only_where_its_parity_allows(
    verdict: str,
    argv: list[str],
    written: bool,
    machine: Callable[..., Fake],
    source: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    machine()
    monkeypatch.setattr(trt_command, "plan_parity", lambda *_: (f"as {verdict}", verdict))
    folder, plan = source.parent, source.with_suffix(".plan")
    args = trt_command.parser().parse_args([str(source), "-o", str(plan), *argv])
    if written:
        trt_command.main(args)
        assert read_sidecar(plan)["precision"] == "fp32"
        return
    with pytest.raises(GateFailed, match=f"as {verdict}; not written"):
        trt_command.main(args)
    assert list(folder.iterdir()) == [source]


def test_the_name_of_a_plan_tells_version_and_gpu(
    machine: Callable[..., Fake], source: Path
) -> None:
    machine()
    plain, _ = convert.build_plan(source, None, "fp32", "auto")
    portable, _ = convert.build_plan(
        source, None, "fp32", "auto", Options(hardware_compatible=True)
    )
    assert plain.name == "net.trt11.4-sm90-fp32.plan"
    assert portable.name == "net.trt11.4-sm80plus-fp32.plan"


def test_a_timing_cache_is_begun_read_and_written_back(
    machine: Callable[..., Fake], source: Path, tmp_path: Path
) -> None:
    fake, cache = machine(), tmp_path / "timing.cache"
    assert made(source, timing_cache=cache)["timing_cache"] == "timing.cache"
    assert cache.read_bytes() == b"+"
    made(source, timing_cache=cache)
    assert cache.read_bytes() == b"++"
    assert [e for e in fake.asked if e[0] == "cache read"] == [
        ("cache read", b""),
        ("cache read", b"+"),
    ]
    assert ("ignore mismatch", True) not in fake.asked


@pytest.mark.parametrize(
    ("then", "said"),
    [
        ({"version": "11.3.0.99"}, "measured by TensorRT 11.4.0.106"),
        (
            {"gpu": driver.CudaDevice("Another", "90", "13.0")},
            "here is TensorRT 11.4.0.106 on Another",
        ),
    ],
)
def test_a_timing_cache_of_another_version_or_gpu_is_refused_by_name(
    then: dict[str, Any], said: str, machine: Callable[..., Fake], source: Path, tmp_path: Path
) -> None:
    machine()
    cache = tmp_path / "timing.cache"
    made(source, timing_cache=cache)
    before = sorted(p.name for p in tmp_path.iterdir())
    fake = machine(**then)
    with pytest.raises(UserError, match=said):
        convert.build_plan(
            source, tmp_path / "b.plan", "fp32", "tensorrt", Options(timing_cache=cache)
        )
    assert cache.read_bytes() == b"+" and fake.count("build") == 0
    assert sorted(p.name for p in tmp_path.iterdir()) == before


def test_a_timing_cache_without_a_maker_is_for_tensorrt_to_judge(
    machine: Callable[..., Fake], source: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "trtexec.cache"
    cache.write_bytes(b"from elsewhere")
    machine("set_cache")
    with pytest.raises(
        UserError, match=r"trtexec\.cache: TensorRT rejects it: set_cache went wrong"
    ):
        made(source, timing_cache=cache)
    assert cache.read_bytes() == b"from elsewhere"
    machine()
    made(source, timing_cache=cache)
    assert json.loads((tmp_path / "trtexec.cache.json").read_text())["sm"] == "90"


def test_a_folder_is_no_timing_cache(machine: Callable[..., Fake], source: Path) -> None:
    machine()
    with pytest.raises(UserError, match="not a file"):
        made(source, timing_cache=source.parent)


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("network", "created no network: network went wrong"),
        ("config", "created no configuration: config went wrong"),
        ("parse", "cannot parse it: parse went wrong"),
        ("model", "cannot parse it: the model went wrong"),
        ("create_profile", "created no optimization profile: create_profile went wrong"),
        (
            "add_profile",
            r"net\.onnx: TensorRT rejects the batches \[1, 1, 8\]: add_profile went wrong",
        ),
        ("create_cache", "rejects it: create_cache went wrong"),
        ("set_cache", "rejects it: set_cache went wrong"),
        ("get_cache", "returned none: get_cache went wrong"),
        ("serialize", "returned none: serialize went wrong"),
        ("build", "cannot build it: build went wrong"),
    ],
)
def test_each_call_that_gives_nothing_is_told_with_tensorrts_words_and_leaves_nothing(
    fails: str, said: str, machine: Callable[..., Fake], source: Path
) -> None:
    machine(fails)
    with pytest.raises(UserError, match=said):
        made(source, timing_cache=source.with_suffix(".cache"))
    assert [p.name for p in source.parent.iterdir()] == ["net.onnx"]


def test_a_plan_whose_sidecar_cannot_be_written_is_not_there(
    machine: Callable[..., Fake], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    machine()
    monkeypatch.setattr(convert.artifacts, "write_json", full)
    with pytest.raises(OSError, match="No space"):
        made(source)
    assert [p.name for p in source.parent.iterdir()] == ["net.onnx"]


def test_a_timing_cache_in_a_place_that_cannot_be_is_refused_before_the_build(
    machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine()
    with pytest.raises(UserError, match="cannot create its folder"):
        made(source, timing_cache=source / "below" / "t.cache")
    assert fake.count("build") == 0


def test_all_unsupported_operators_are_listed_with_their_nodes(
    machine: Callable[..., Fake], tmp_path: Path
) -> None:
    machine()
    source = network(tmp_path / "odd.onnx", "Frob", "Relu", "Twist", "Frob")
    with pytest.raises(UserError) as told:
        made(source)
    assert str(told.value) == (
        "odd.onnx: TensorRT cannot parse 3 of its nodes: Frob node_0 (no importer); "
        "Twist node_2 (no importer); Frob node_3 (no importer)"
    )


def test_a_gpu_older_than_ampere_has_no_hardware_compatible_engine(
    machine: Callable[..., Fake], source: Path
) -> None:
    machine(gpu=driver.CudaDevice("Turing", "75", "13.0"))
    with pytest.raises(UserError, match=r"got Turing, SM 75; expected SM 80"):
        made(source, hardware_compatible=True)


@pytest.mark.parametrize("level", [-1, 6])
def test_a_level_out_of_range_is_refused(
    level: int, machine: Callable[..., Fake], source: Path
) -> None:
    machine()
    with pytest.raises(UserError, match=f"--optimization-level: got {level}; expected 0 to 5"):
        made(source, optimization_level=level)


HERE = {"version": "11.4.0.106", "gpu": GPU}


@pytest.mark.parametrize(
    ("options", "built", "here", "runs"),
    [
        ({}, HERE, HERE, True),
        ({}, {**HERE, "version": "11.3.0.99"}, HERE, False),
        ({"version_compatible": True}, {**HERE, "version": "11.3.0.99"}, HERE, True),
        ({"version_compatible": True}, {**HERE, "version": "11.5.0.1"}, HERE, False),
        ({"version_compatible": True}, {**HERE, "version": "10.14.1.48.post1"}, HERE, True),
        ({"version_compatible": True}, HERE, {**HERE, "version": "12.0.0.1"}, False),
        ({}, HERE, {**HERE, "gpu": driver.CudaDevice("B", "100", "13.0")}, False),
        ({}, HERE, {**HERE, "gpu": driver.CudaDevice("Same", "90", "13.0")}, True),
        (
            {"hardware_compatible": True},
            HERE,
            {**HERE, "gpu": driver.CudaDevice("B", "120", "13.0")},
            True,
        ),
        (
            {"hardware_compatible": True},
            HERE,
            {**HERE, "gpu": driver.CudaDevice("O", "87", "13.0")},
            True,
        ),
        (
            {"hardware_compatible": True},
            HERE,
            {**HERE, "gpu": driver.CudaDevice("T", "75", "13.0")},
            False,
        ),
    ],
)
def test_where_a_plan_may_run(
    options: dict[str, Any],
    built: dict[str, Any],
    here: dict[str, Any],
    runs: bool,
    machine: Callable[..., Fake],
    source: Path,
) -> None:
    machine(**built)
    made(source, **options)
    plan = source.with_suffix(".plan")
    machine(**here)
    if runs:
        assert TrtSession(plan).input_shape == (None, 3, 8, 8)
        return
    flags = "".join(f" --{name.replace('_', '-')}" for name in options)
    with pytest.raises(Unavailable) as told:
        TrtSession(plan)
    assert str(told.value).endswith(
        f"build it here with `python -m exporters.trt net.onnx -o {plan} --precision fp32 --backend tensorrt "
        f"--shapes 1,1,8{flags}`"
    )


@pytest.mark.parametrize("portable", [True, False])
def test_only_a_version_compatible_plan_may_bring_host_code(
    portable: bool, machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine()
    made(source, version_compatible=portable)
    TrtSession(source.with_suffix(".plan"))
    assert ("host code", portable) in fake.asked


def images(count: int) -> np.ndarray[Any, Any]:
    return np.arange(count * 3 * 8 * 8, dtype=np.float32).reshape(count, 3, 8, 8)


def expected(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return np.asarray(x.mean(axis=(1, 2, 3))[:, None] + np.arange(4), np.float32)


def test_a_graph_is_captured_once_a_batch_size_after_a_warm_up_run_and_replayed(
    machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine()
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    assert session.runtime == "tensorrt 11.4.0.106, CUDA graph"
    for call, batch in enumerate((2, 2, 3, 2, 3)):
        x = images(batch) + 100 * call  # what an earlier call left in a buffer is not the answer
        np.testing.assert_array_equal(session.run(x), expected(x))
    steps = [e[0] for e in fake.asked if e[0] in ("context", "execute", "capture", "replay")]
    bound = ["context", "execute", "capture", "execute", "replay"]
    assert steps == [*bound, "replay", *bound, "replay", "replay"]
    assert len(fake.cuda.graphs) == 2  # what they were made executable from is gone


def test_rtx_captures_by_itself_in_a_context_a_batch_size(
    machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine()
    plan, _ = convert.build_plan(source, source.with_suffix(".plan"), "fp32", "rtx")
    session = TrtSession(plan)
    assert session.runtime == "tensorrt_rtx 11.4.0.106, CUDA graph"
    for call, batch in enumerate((2, 3, 2)):
        x = images(batch) + 100 * call
        np.testing.assert_array_equal(session.run(x), expected(x))
    strategies = [e[1] for e in fake.asked if e[0] == "strategy"]
    assert strategies == ["whole graph"] * 2
    assert fake.count("capture") == fake.count("replay") == 0 and fake.count("execute") == 3
    TrtSession(plan, cuda_graph=False).run(images(1))
    assert [e[1] for e in fake.asked if e[0] == "strategy"][2:] == [None]


def test_a_capture_in_which_the_engine_fails_is_ended_and_told(
    machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine("captured")
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    said = r"net\.plan: no CUDA graph of it: batch 2: .*captured went wrong; run it with CAKD_CUDA_GRAPH=0"
    with pytest.raises(UserError, match=said):
        session.run(images(2))
    assert fake.cuda.captured is None


def test_a_half_precision_output_is_given_as_float32(
    machine: Callable[..., Fake], source: Path
) -> None:
    machine().logits = np.dtype(np.float16)
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    logits = session.run(images(3) / 100)
    assert logits.dtype == np.float32
    np.testing.assert_array_equal(logits, expected(images(3) / 100).astype(np.float16))


def test_a_session_that_goes_gives_its_device_memory_back(
    machine: Callable[..., Fake], source: Path
) -> None:
    fake = machine()
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    session.run(images(2))
    assert len(fake.cuda.memory) == 3  # image, logits, index
    del session
    gc.collect()
    assert not fake.cuda.memory


@pytest.mark.parametrize("broken", ["library", "driver"])
def test_without_the_cuda_runtime_an_engine_is_unavailable_with_the_reason(
    broken: str, machine: Callable[..., Fake], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine("driver")
    made(source)
    if broken == "library":
        monkeypatch.setattr(cudart, "_load", lambda: None)
    said = {"library": "no CUDA runtime library", "driver": "cudaGetDeviceCount: got 35"}
    with pytest.raises(Unavailable, match=rf"net\.plan: {said[broken]}"):
        TrtSession(source.with_suffix(".plan"))


def test_a_call_of_cuda_that_fails_is_told_with_the_plan(
    machine: Callable[..., Fake], source: Path
) -> None:
    machine("cudaMalloc")
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    with pytest.raises(UserError, match=r"net\.plan: cudaMalloc: got 2, words") as told:
        session.run(images(1))
    assert not isinstance(told.value, Unavailable) and "--runtime" not in str(told.value)


def test_a_result_outlives_the_next_run(machine: Callable[..., Fake], source: Path) -> None:
    machine()
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    first = session.run(images(2))
    session.run(images(2) + 5)
    np.testing.assert_array_equal(first, expected(images(2)))


def test_more_images_than_the_largest_batch_run_in_parts(
    machine: Callable[..., Fake], source: Path
) -> None:
    machine()
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    np.testing.assert_array_equal(session.run(images(19)), expected(images(19)))


@pytest.mark.parametrize("switch", ["argument", "environment"])
def test_graphs_can_be_turned_off(
    switch: str, machine: Callable[..., Fake], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = machine()
    made(source)
    if switch == "environment":
        monkeypatch.setenv("CAKD_CUDA_GRAPH", "0")
    session = TrtSession(source.with_suffix(".plan"), False if switch == "argument" else None)
    for call, batch in enumerate((2, 3, 2)):
        x = images(batch) + 100 * call
        np.testing.assert_array_equal(session.run(x), expected(x))
    assert fake.count("capture") == 0 and session.runtime == "tensorrt 11.4.0.106"
    assert fake.count("context") == 1 and fake.count("execute") == 3


def test_a_switch_that_is_neither_0_nor_1_is_refused(
    machine: Callable[..., Fake], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    made(source)
    monkeypatch.setenv("CAKD_CUDA_GRAPH", "off")
    with pytest.raises(UserError, match="CAKD_CUDA_GRAPH: got 'off'; expected 0 or 1"):
        TrtSession(source.with_suffix(".plan"))


@pytest.mark.parametrize(
    ("fails", "said"),
    [
        ("deserialize", "does not load: deserialize went wrong; build it again: `python -m"),
        ("context", "no execution context: context went wrong; free device memory"),
        (
            "input_shape",
            r"batch: got 2; the engine takes 1 to 8; TensorRT rejects \(2, 3, 8, 8\): input_shape went wrong",
        ),
        ("address", "image: TensorRT rejects its buffer: address went wrong"),
        ("execute", "batch 2: the engine failed to run: execute went wrong"),
        (
            "capture",
            "no CUDA graph of it: cudaStreamEndCapture: got 901, words.*CAKD_CUDA_GRAPH=0",
        ),
    ],
)
def test_each_failure_of_a_run_is_told_with_the_plan_and_tensorrts_words(
    fails: str, said: str, machine: Callable[..., Fake], source: Path
) -> None:
    machine(fails)
    made(source)
    with pytest.raises(UserError, match=rf"net\.plan: .*{said}"):
        TrtSession(source.with_suffix(".plan")).run(images(2))


def test_an_output_whose_shape_depends_on_the_data_is_refused(
    machine: Callable[..., Fake], source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    machine()
    made(source)
    shape = lambda self, name: self.shape if name == "image" else (-1, 4)  # noqa: E731
    monkeypatch.setattr(fake_tensorrt.Context, "get_tensor_shape", shape)
    with pytest.raises(UserError, match=r"output logits: got .*\(-1, 4\); expected a fixed shape"):
        TrtSession(source.with_suffix(".plan")).run(images(1))


@pytest.mark.parametrize(
    ("key", "value"), [("version", None), ("shapes", 8), ("version_compatible", "yes"), ("gpu", 90)]
)
def test_a_sidecar_with_a_key_that_cannot_be_meant_is_refused(
    key: str, value: Any, machine: Callable[..., Fake], source: Path
) -> None:
    machine()
    made(source)
    path = sidecar_path(source.with_suffix(".plan"))
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(UserError, match=rf"net\.plan\.json: {key}: got {value!r}; build it with"):
        read_sidecar(source.with_suffix(".plan"))


def test_a_plan_of_the_older_schema_is_refused(machine: Callable[..., Fake], source: Path) -> None:
    machine()
    made(source)
    sidecar = sidecar_path(source.with_suffix(".plan"))
    sidecar.write_text(sidecar.read_text().replace("cakd.plan/2", "cakd.plan/1"))
    with pytest.raises(UserError, match="schema: got 'cakd.plan/1'"):
        TrtSession(source.with_suffix(".plan"))


def placed(fake: Fake, source: Path) -> dict[str, Any]:
    """Placement of a plan whose engine has run once."""
    made(source)
    session = TrtSession(source.with_suffix(".plan"))
    session.run(images(1))
    return session.placement()


def test_the_layers_of_the_engine_are_counted_by_the_type_of_their_first_input(
    machine: Callable[..., Fake], source: Path
) -> None:
    told = placed(machine(), source)
    assert (told["source"], told["reason"]) == ("the engine inspector", None)
    assert {group["location"] for group in told["groups"]} == {"GPU"}
    assert {group["precision"]: group["operators"] for group in told["groups"]} == {
        "fp16": {"CaskConvolution": 2},
        "bf16": {"kgen": 1},
        "conversion": {"Reformat": 1},
        "int8": {"kgen": 1},
        "other": {"Shape": 1},
    }


@pytest.mark.parametrize(
    "layers", [["conv + relu", "head"], [], None, [{"LayerType": "kgen"}], [{"Inputs": [{}]}]]
)
def test_layers_without_types_are_a_reason_not_an_error(
    machine: Callable[..., Fake], source: Path, layers: Any
) -> None:
    fake = machine()
    fake.layers = layers
    told = placed(fake, source)
    assert told["groups"] == [] and "tells no types of layers; build the plan" in told["reason"]


def test_an_engine_without_an_inspector_says_why(
    machine: Callable[..., Fake], source: Path
) -> None:
    told = placed(machine("inspector"), source)
    assert told["reason"] == "the engine inspector gives nothing: inspector went wrong"
