"""Quantization-aware distillation: folding, learned ranges, simulation against exported network, resuming."""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from exporters.artifact import agreement, inputs, onnx_file
from exporters.artifact.eager import EagerSession
from exporters.artifact.reference import Exported
from exporters.artifact.session import TARGETS
from exporters.bench import floating
from exporters.build import Build, artefact_parity
from exporters.open import RUNTIMES
from exporters.ort import export, int8, placement, quantize, simulated, trained
from exporters.ort.session import OrtSession
from pipeline.core import artifacts, machine
from pipeline.core.errors import UserError
from pipeline.data.prepared import Prepared, normalised
from pipeline.distill import distill
from pipeline.distill.settings import Distill
from pipeline.models import checkpoint
from pipeline.models.ranges import symmetric
from pipeline.quantize import fine_tune, folding, simulation
from pipeline.quantize.lsq import Quantizer
from pipeline.quantize.settings import Quantize
from tests import artefacts
from tests.conftest import CNN, Once

HERE = machine.machine()
SATURATING = HERE["arch"] == "x86_64" and not {"avx_vnni", "avx512_vnni", "amx"} & {*HERE["isa"]}
exact_int8_kernels = pytest.mark.skipif(
    SATURATING,
    reason="an x86 CPU without VNNI, where ONNX Runtime's int8 kernels saturate",
)

Command = Callable[..., subprocess.CompletedProcess[str]]
SETTINGS = Quantize(steps=12)
# With a convolution in front of every batch norm: residuals, hard-swish and squeeze-excite, relu6, branches, GELU.
FAMILIES = (
    "test_resnet",
    "mobilenetv3_small_050",
    "efficientnet_lite0",
    "repvgg_a0",
    "convnext_atto",
)


def reactive(name: str) -> nn.Module:
    """A student of 10 classes whose batch norms and layer scales do something."""
    torch.manual_seed(0)
    network = checkpoint.create(name, {}, 10)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 1.5)
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            nn.init.uniform_(module.gamma, 0.5, 1.5)
    return network.eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_a_folded_student_and_the_plain_one_it_is_written_back_to_compute_the_same(
    name: str,
) -> None:
    network, x = reactive(name), torch.from_numpy(inputs.smooth(4, 64, 64))
    folded = folding.merge_branches(copy.deepcopy(network))
    norms = folding.fold(folded, 64)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    plain = folding.unfold(folded, copy.deepcopy(network), norms)
    with torch.no_grad():
        reference = network(x)
        for other in (folded, folded.train(), plain):
            assert (other(x) - reference).abs().max() <= 2e-4 * reference.std()
    assert plain.state_dict().keys() == network.state_dict().keys()
    again = folding.merge_branches(copy.deepcopy(plain))
    folding.fold(again, 64)
    for key, value in folded.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key


def test_networks_that_cannot_be_folded_are_refused() -> None:
    with pytest.raises(UserError, match="whose batch norm .* follows no convolution; expected"):
        folding.fold(checkpoint.create("densenet121", {}, 10), 64)
    with pytest.raises(UserError, match="which merges .* at its export; expected"):
        folding.merge_branches(checkpoint.create("mobileone_s0", {}, 10))


@pytest.mark.parametrize("axis", [None, 0])
def test_the_gradients_are_those_of_pytorchs_learnable_quantizer(axis: int | None) -> None:
    torch.manual_seed(0)
    x = torch.randn(6, 5, 4, requires_grad=True)
    scales = (
        torch.full((6,), 0.005) + 0.01 * torch.rand(6) if axis is not None else torch.tensor(0.01)
    )
    own = Quantizer(scales, -127, 127, axis)
    assert (x / own.scale.max()).abs().max() > 127  # some are cut off
    weights = torch.randn(6, 5, 4)
    (own(x) * weights).sum().backward()
    mine, to_x = own.log_scale.grad, x.grad
    x.grad, scale = None, scales.clone().requires_grad_()
    factor = 1 / np.sqrt((x.numel() if axis is None else 20) * 127)
    if axis is None:
        call = torch._fake_quantize_learnable_per_tensor_affine
        y = call(x, scale.view(1), torch.zeros(1), -127, 127, factor)
    else:
        call = torch._fake_quantize_learnable_per_channel_affine
        y = call(x, scale, torch.zeros(6), 0, -127, 127, factor)
    (y * weights).sum().backward()
    assert torch.allclose(own(x), y, atol=1e-6) and torch.allclose(to_x, x.grad)
    assert torch.allclose(mine, scale.grad * scales, rtol=1e-3, atol=1e-5)


def test_a_range_does_not_pass_the_clip_that_int8_takes_over() -> None:
    quantizer = Quantizer(torch.tensor(6 / 255), 0, 255, ceiling=6.0)
    with torch.no_grad():
        quantizer.log_scale.add_(1)
    assert quantizer.scale.item() * 255 == pytest.approx(6, rel=1e-6)


@pytest.fixture(scope="module")
def chain(digits: Path, teacher_path: Path, features: Path, once: Once) -> Path:
    """A student distilled by `logits` for 150 steps, fine-tuned for 12: checkpoints, simulated logits.

    The ONNX of the fine-tuned one, with its ranges; that of the distilled one in `fp32`.
    """

    def make(folder: Path) -> None:
        prepared = Prepared.open(digits)
        config = Distill(("logits",), "test_resnet", CNN, steps=150)
        shared = (prepared, teacher_path, features)
        distill.distill(config, "logits", *shared, folder / "distilled", folder / "work")
        x = calibration(prepared, folder)
        student = fine_tune.Student.load(folder / "distilled" / "student.safetensors")
        (folder / "fp32").mkdir()
        simulated.write_onnx(student, folder / "fp32", 18)
        simulated_by = simulation_of(folder, student, x)
        fine_tune.fine_tune(
            config, SETTINGS, student, simulated_by, *shared, folder / "trained", folder / "work"
        )
        with torch.no_grad():
            np.save(folder / "simulated.npy", student.folded.eval()(torch.from_numpy(x)).numpy())
        trained_student = fine_tune.Student.load(folder / "trained" / "student.safetensors")
        simulated.write_onnx(trained_student, folder, 18)

    return once("quantized", make)


def calibration(prepared: Prepared, folder: Path) -> np.ndarray[Any, np.dtype[np.float32]]:
    preprocess = checkpoint.describe(folder / "distilled" / "student.safetensors")["preprocess"]
    return normalised(prepared.images.squares(prepared.rows("train")[:400]), preprocess)


def simulation_of(
    chain: Path, student: fine_tune.Student, x: Any, settings: Quantize = SETTINGS
) -> simulation.Simulation:
    source = chain / "fp32" / "student.onnx"
    found, layers = simulated.simulate(student, source, x, settings, "minmax", judge=False)
    assert layers == []
    return found


def images(chain: Path, digits: Path) -> int8.CalibrationImages:
    x = calibration(Prepared.open(digits), chain)
    return int8.CalibrationImages(x, x, np.full(len(x), -1))


@exact_int8_kernels
def test_the_exported_network_computes_its_simulation(
    chain: Path, digits: Path, tmp_path: Path
) -> None:
    held = images(chain, digits)
    proto = int8.quantize_within_gates(
        chain / "student.onnx", held, int8.Settings(), agreement.Thresholds()
    )
    onnx_file.write_onnx(proto, tmp_path / "int8.onnx")
    session = OrtSession(tmp_path / "int8.onnx", 1)
    assert session.metadata["int8"] == "trained ranges, every node in int8"
    logits = inputs.run_batches(session, held.calibration)
    metrics, *_ = agreement.compare_outputs(
        np.load(chain / "simulated.npy"), logits, "int8", agreement.Thresholds()
    )
    assert metrics["top1_agreement"] >= 0.995 and metrics["sqnr_centered_db"] > 30
    calibrated = quantize.to_int8(onnx_file.read_onnx(chain / "student.onnx"), held.calibration)
    assert proto.SerializeToString() != calibrated.SerializeToString()


def test_the_scales_of_the_exported_network_are_the_trained_ones(chain: Path, digits: Path) -> None:
    ranges = json.loads((chain / "student-ranges.json").read_text())
    x = images(chain, digits).calibration[:8]
    source = onnx_file.read_onnx(chain / "student.onnx")
    with quantize.Calibrated(source, x) as network:
        found, _ = trained.read(network.quantized(ranges=ranges))
    assert found["activations"] == ranges["activations"] and found["weights"] == ranges["weights"]
    assert 15 < ranges["sqnr_db"] < 60
    first = json.loads((chain / "trained" / "student.json").read_text())["weights_sha256"]
    assert ranges["weights_sha256"] == first


def test_tensorrt_gets_the_trained_ranges_on_signed_grids(chain: Path, digits: Path) -> None:
    ranges = json.loads((chain / "student-ranges.json").read_text())
    source = onnx_file.read_onnx(chain / "student.onnx")
    x = images(chain, digits).calibration[:8]
    proto = quantize.at_precision(source, "int8", x, ranges)
    constants = {w.name: onnx.numpy_helper.to_array(w) for w in proto.graph.initializer}
    for name, grid in ranges["activations"].items():
        assert constants[f"{name}_scale"] == np.float32(symmetric(grid))
        assert constants[f"{name}_zero_point"] == 0
        assert constants[f"{name}_zero_point"].dtype == np.int8
    assert float(onnx_file.read_metadata(proto)[agreement.TRAINED]) == ranges["sqnr_db"]


def test_what_one_operator_of_pytorch_computes_stays_in_one_piece() -> None:
    """GELU is five nodes in ONNX: none of them is quantized, the layers around it are."""
    network = reactive("convnext_atto")
    folding.fold(network, 32)
    x = inputs.smooth(8, 32, 32)
    proto = export._trace(network, 32, 18)
    sites = simulation.Sites(network, torch.from_numpy(x[:1]))
    with quantize.Calibrated(proto, x) as calibrated:
        placed = placement.place(calibrated, x[:1], sites.computed, [], "int32")
        nodes = {n.name: n.op_type for n in calibrated.folded.graph.node}
    kinds = {nodes[name] for name in placed.ranges["floating"]}
    assert kinds == {"Add", "Mul", "LayerNormalization"}  # ONNX Runtime has no int8 Div and Erf
    assert len(placed.weights) == sum(kind in quantize.PRODUCTS for kind in nodes.values())
    assert set(sites.find(placed.values, placed.owners).values()) == set(
        placed.ranges["activations"]
    )


def test_first_last_and_the_most_sensitive_layers_stay_in_float_by_the_settings() -> None:
    groups = ["stem", "a", "b", "c", "head"]
    alone = dict(zip(groups, (10.0, 30.0, 12.0, 20.0, 5.0), strict=True))
    chosen = simulated.floating_groups
    assert chosen(groups, alone, Quantize()) == []
    ends = Quantize(first="float", last="float", floating=2)
    assert chosen(groups, alone, ends) == ["stem", "head", "b", "c"]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[set[str]]:
    """Instead of timing: the nodes in float of both networks of each comparison, whose ratio is then 1.25."""
    compared: list[set[str]] = []

    def compare(*sides: Any) -> Any:
        for side in sides[:2]:
            nodes = OrtSession(side.artefact, side.threads).precisions()
            compared.append({name for name, at in nodes.items() if at == "fp32"})
        ratio = {"median": 1.25, "ci_low": 1.2, "ci_high": 1.3, "tol": 0.1, "verdict": "FAIL"}
        return {"ratio": ratio, "reason": None}, []

    monkeypatch.setattr(floating, "compare_artefacts", compare)
    return compared


def calibrated_student(
    chain: Path, folder: Path, x: Any, settings: Quantize = SETTINGS
) -> tuple[fine_tune.Student, Path]:
    """The distilled student, and its ONNX in `folder` with calibrated ranges, as if it were fine-tuned."""
    student = fine_tune.Student.load(chain / "distilled" / "student.safetensors")
    found = simulation_of(chain, student, x, settings)
    artifacts.write_json(folder / "student-ranges.json", found.ranges())
    return student, Path(shutil.copy(chain / "fp32" / "student.onnx", folder))


def test_the_stem_that_stays_in_float_is_named_with_its_cost(
    chain: Path, digits: Path, tmp_path: Path, clock: list[set[str]]
) -> None:
    x = calibration(Prepared.open(digits), chain)[:64]
    settings = Quantize(steps=12, first="float")
    found = floating.measure(*calibrated_student(chain, tmp_path, x, settings), ["conv1.0"], x)
    (layer,) = found["layers"]
    assert layer["name"] == "conv1.0" and found["reason"] is None
    assert found["cpu_ratio"] == {"median": 1.25, "ci_low": 1.2, "ci_high": 1.3}
    mixed, whole = clock
    assert set(layer["nodes"]) <= mixed and not set(layer["nodes"]) & whole
    assert len(layer["nodes"]) == 1 and "Conv" in layer["nodes"][0]


def test_a_layer_that_onnx_runtime_runs_in_int8_all_the_same_has_no_cost(
    chain: Path, digits: Path, tmp_path: Path, clock: list[set[str]]
) -> None:
    x = calibration(Prepared.open(digits), chain)[:64]
    student, source = calibrated_student(chain, tmp_path, x)
    path = tmp_path / "student-ranges.json"
    with quantize.Calibrated(onnx_file.read_onnx(chain / "student.onnx"), x) as network:
        names = simulated.layer_names(network)
        group = next(group for group, name in names.items() if name == "conv1.3")
        ranges = json.loads(path.read_text()) | {"floating": [group]}
    artifacts.write_json(path, ranges)
    found = floating.measure(student, source, ["conv1.3"], x)
    assert found == {"layers": [{"name": "conv1.3", "nodes": []}]} and not clock


def test_with_every_layer_in_int8_nothing_is_left_in_float(
    chain: Path, digits: Path, tmp_path: Path, clock: list[set[str]]
) -> None:
    x = calibration(Prepared.open(digits), chain)[:64]
    assert (
        floating.measure(*calibrated_student(chain, tmp_path, x), [], x) == {"layers": []}
        and not clock
    )


@exact_int8_kernels
@pytest.mark.parametrize("ends", [{"first": "float"}, {"last": "float"}])
def test_a_network_with_an_end_in_float_computes_its_simulation(
    ends: dict[str, Any], chain: Path, digits: Path, tmp_path: Path
) -> None:
    x = calibration(Prepared.open(digits), chain)[:64]
    student = fine_tune.Student.load(chain / "distilled" / "student.safetensors")
    found = simulation_of(chain, student, x, Quantize(steps=12, **ends))
    source = onnx_file.read_onnx(chain / "fp32" / "student.onnx")
    with quantize.Calibrated(source, x) as network:
        proto = network.quantized(ranges=found.ranges())
    onnx_file.write_onnx(proto, tmp_path / "int8.onnx")
    logits = inputs.run_batches(OrtSession(tmp_path / "int8.onnx", 1), x)
    found.attach(student.folded)
    reference = inputs.run_batches(EagerSession(student.folded, student.description, 1), x)
    metrics, *_ = agreement.compare_outputs(reference, logits, "int8", agreement.Thresholds())
    assert metrics["top1_agreement"] >= 0.98 and metrics["sqnr_centered_db"] > 30


def test_ranges_of_other_weights_or_of_another_network_are_refused(
    chain: Path, tmp_path: Path
) -> None:
    shutil.copy(chain / "student.onnx", tmp_path)
    ranges = json.loads((chain / "student-ranges.json").read_text())
    path = tmp_path / "student-ranges.json"
    artifacts.write_json(path, {**ranges, "weights_sha256": "0" * 64})
    with pytest.raises(
        UserError, match="got ranges of the weights 000000000000; expected those of"
    ):
        trained.beside(tmp_path / "student.onnx")
    artifacts.write_json(path, {**ranges, "floating": ["no such node"]})
    found = trained.beside(tmp_path / "student.onnx")
    assert found is not None
    with pytest.raises(UserError, match="got 'no such node', which the network does not have"):
        trained.overrides(onnx_file.read_onnx(tmp_path / "student.onnx"), found, symmetric=False)


def test_a_trained_network_may_be_as_far_from_float32_as_its_simulation_was() -> None:
    class Trained:
        def __init__(self, **metadata: str) -> None:
            self.metadata = metadata

    def gate(**metadata: str) -> float:
        session: Any = Trained(**metadata)
        return agreement.fair_thresholds(session, agreement.Thresholds()).int8_db

    assert gate() == gate(int8_sqnr_db="31.5") == gate(int8_sqnr_db="not a number") == 15.0
    assert gate(int8_sqnr_db="10.5") == 7.5


PARAMS = {
    "distill": {
        "methods": ["logits"],
        "student": "test_resnet",
        "student_kwargs": CNN,
        "steps": 150,
        "checkpoint_every": 3,
    },
    "cache": {"dtype": "float32", "views": 2, "shard_mb": 9},
    "export": {"calibration_images": 64, "reference_images": 32},
    "build": {},
    "evaluate": {"split": "test", "crop_pct": 1.0},
}


Stage = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture
def stage(
    chain: Path, digits: Path, teacher_path: Path, features: Path, tmp_path: Path, command: Command
) -> Stage:
    """`stage(steps)`: the stage on the chain's student, into `out` and out.json below tmp_path or `below`."""
    shutil.copytree(chain / "distilled", tmp_path / "students" / "logits")
    (tmp_path / "selection.json").write_text(json.dumps(artefacts.selection("logits")))

    def run(
        steps: int, below: Path = tmp_path, **settings: Any
    ) -> subprocess.CompletedProcess[str]:
        params = tmp_path / "params.yaml"
        params.write_text(json.dumps({**PARAMS, "quantize": {"steps": steps, **settings}}))
        paths = [digits, teacher_path, features, tmp_path / "students", tmp_path / "selection.json"]
        options = ["--params", params, "--work", tmp_path / "work"]
        return command("stages.quantize", *paths, below / "out", below / "out.json", *options)

    return run


@pytest.fixture
def fine_tuned(stage: Stage, once: Once) -> Path:
    """What the stage makes in 12 steps: the folder `out`, and out.json."""

    def make(folder: Path) -> None:
        done = stage(12, folder)
        assert done.returncode == 0, done.stderr

    return once("fine-tuned", make)


def test_the_stage_measures_both_kinds_of_int8_in_every_runtime(
    stage: Stage, tmp_path: Path, clock: list[set[str]]
) -> None:
    done = stage(12, first="float")
    assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "out.json").read_text())
    rows = {(row["target"], row["ranges"]): row for row in figures["rows"]}
    for by in ("calibration", "training"):
        assert abs(rows["ort-int8", by]["top1"] - figures["fp32_top1"]) <= 0.1
        assert rows["ort-int8", by]["sqnr_centered_db"] > (8 if SATURATING else 15)
    assert len(figures["layers"]) == 17 and figures["training"]["steps"] == 12
    assert [layer["name"] for layer in figures["floating"]["layers"]] == ["conv1.0"]
    assert figures["floating"]["cpu_ratio"]["median"] == 1.25 and len(clock) == 2
    assert {p.name for p in (tmp_path / "out").iterdir()} == {
        *("student.safetensors", "student.json", "student-ranges.json")
    }
    assert "fp32" in done.stdout and "ort-int8 by training" in done.stdout


def test_the_export_of_it_is_judged_by_the_accuracy_of_the_distilled_student(
    fine_tuned: Path, digits: Path, teacher_path: Path, tmp_path: Path, command: Command
) -> None:
    assert json.loads((fine_tuned / "out.json").read_text())["floating"] == {"layers": []}
    folders = [tmp_path / "students", tmp_path / "selection.json", fine_tuned / "out"]
    paths, params = [*folders, teacher_path, digits, tmp_path / "export"], tmp_path / "params.yaml"
    params.write_text(json.dumps(PARAMS))
    done = command("stages.export", *paths, "--params", params)
    assert done.returncode == 0, done.stderr
    exported = Exported.open(tmp_path / "export")
    distilled = EagerSession(*checkpoint.load(tmp_path / "students/logits/student.safetensors"), 1)
    expected = inputs.run_batches(distilled, exported.x["student"])
    assert exported.distilled is not None and np.allclose(exported.distilled, expected, atol=1e-4)
    # As if distillation had known every answer: int8 then loses all that it gets wrong.
    known = np.eye(10, dtype=np.float32)[exported.labels]
    perfect = dataclasses.replace(exported, distilled=known)
    target, rows = TARGETS["ort-int8"], []
    for case in (exported, perfect):
        (tmp_path / "built").mkdir(exist_ok=True)
        artefact = RUNTIMES["ort"].make("int8", "student", case, tmp_path / "built", Build())
        rows.append(artefact_parity(target, "int8", artefact, "student", case, Build()))
    assert rows[1]["top1_drop"] > rows[0]["top1_drop"] and rows[1]["verdict"] == "FAIL"
    assert rows[0]["int8"] == "trained ranges, every node in int8"


def test_with_0_steps_the_export_is_that_of_the_distilled_student_to_the_byte(
    stage: Stage, digits: Path, teacher_path: Path, tmp_path: Path, command: Command
) -> None:
    done = stage(0)
    assert done.returncode == 0 and "stays as it was distilled" in done.stdout
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["nothing.txt"]
    hashes = []
    for quantized in (tmp_path / "out", tmp_path / "nothing"):
        paths = [
            tmp_path / "students",
            tmp_path / "selection.json",
            quantized,
            teacher_path,
            digits,
        ]
        out = tmp_path / f"export-{quantized.name}"
        done = command("stages.export", *paths, out, "--params", tmp_path / "params.yaml")
        assert done.returncode == 0, done.stderr
        hashes.append({p.name: artifacts.sha256(p) for p in out.iterdir()})
    assert hashes[0] == hashes[1] and "student-ranges.json" not in hashes[0]


def test_stopped_and_run_again_the_student_is_the_same(
    stage: Stage, fine_tuned: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    step, calls = distill.train_step, []

    def interrupted(*arguments: Any) -> Any:
        calls.append(arguments[1])
        if len(calls) == 8:
            signal.raise_signal(signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(distill, "train_step", interrupted)
    assert stage(12).returncode == 128 + signal.SIGTERM
    assert stage(12).returncode == 0 and calls == list(range(12))
    for name in ("student.safetensors", "student-ranges.json"):
        assert (tmp_path / "out" / name).read_bytes() == (fine_tuned / "out" / name).read_bytes()


def test_the_stage_goes_on_with_the_projectors_of_the_distillation(
    digits: Path, teacher_path: Path, features: Path, tmp_path: Path
) -> None:
    from pipeline.distill.trainer import build

    prepared = Prepared.open(digits)
    config = Distill(("cakd",), "test_resnet", CNN, steps=3)
    shared = (prepared, teacher_path, features)
    distill.distill(config, "cakd", *shared, tmp_path / "s", tmp_path / "work")
    trainer = build(config, "cakd", *shared)
    fine_tune.load_projectors(trainer.objective, tmp_path / "s" / "projectors.safetensors")
    saved = checkpoint.load_file(tmp_path / "s" / "projectors.safetensors")
    own = trainer.objective.projectors()
    assert own is not None and all(torch.equal(own[key], value) for key, value in saved.items())


@exact_int8_kernels
def test_a_bundle_of_it_holds_the_trained_ranges_and_verifies(
    chain: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    done = command("exporters.bundle", chain / "student.onnx", tmp_path / "b", "--calib", digits)
    assert done.returncode == 0, done.stderr
    proto = onnx_file.read_onnx(tmp_path / "b" / "model-int8-cpu.onnx")
    assert onnx_file.read_metadata(proto)["int8"].startswith("trained ranges")
    for runtime in ("ort", "ov"):
        verified = command_in(tmp_path / "b", runtime)
        assert verified.returncode == 0, verified.stdout + verified.stderr


def test_a_bundle_of_a_network_below_15_db_has_the_gate_that_its_simulation_sets(
    chain: Path, digits: Path, tmp_path: Path, command: Command
) -> None:
    """Eight times the scales of its activations make it worse than 15 dB; its simulation was as bad.

    The images bear no class, so that its top-1, which falls too, is not judged.
    """
    shutil.copy(chain / "student.onnx", tmp_path)
    prepared, unlabelled = Prepared.open(digits), tmp_path / "unlabelled"
    unlabelled.mkdir()
    for row in prepared.rows("val"):
        prepared.images.image(row).save(unlabelled / f"{row}.png")
    ranges = json.loads((chain / "student-ranges.json").read_text())
    for grid in ranges["activations"].values():
        grid["scale"] *= 8
    manifests = {}
    for simulated_db in (12.0, 31.0):
        artifacts.write_json(tmp_path / "student-ranges.json", {**ranges, "sqnr_db": simulated_db})
        out = tmp_path / f"{simulated_db:.0f}"
        done = command("exporters.bundle", tmp_path / "student.onnx", out, "--calib", unlabelled)
        assert done.returncode == 0, done.stderr
        manifests[simulated_db] = json.loads((out / "manifest.json").read_text())
    (int8_model,) = [m for m in manifests[12.0]["models"] if m["file"] == "model-int8-cpu.onnx"]
    assert int8_model["int8_db"] == 9.0 < int8_model["parity"]["sqnr_centered_db"] < 15
    assert not any("int8_db" in m for m in manifests[12.0]["models"] if m["precision"] != "int8")
    left_out = [entry["reason"] for entry in manifests[31.0]["left_out"]]
    assert len(left_out) == 2 and all("gate 15 dB" in reason for reason in left_out)
    for runtime in ("ort", "ov"):
        verified = command_in(tmp_path / "12", runtime)
        assert verified.returncode == 0, verified.stdout + verified.stderr
    assert "int8 gate 9 dB" in verified.stdout


def command_in(bundle: Path, runtime: str) -> subprocess.CompletedProcess[str]:
    import sys

    argv = [sys.executable, "-m", "bundle.run", "--verify", "--runtime", runtime]
    return subprocess.run(argv, cwd=bundle, capture_output=True, text=True)


def test_the_simulated_student_is_a_session_like_any_other(chain: Path, digits: Path) -> None:
    x = calibration(Prepared.open(digits), chain)
    student = fine_tune.Student.load(chain / "distilled" / "student.safetensors")
    found = simulation_of(chain, student, x)
    before = inputs.run_batches(EagerSession(student.folded, student.description, 1), x[:32])
    found.attach(student.folded)
    after = inputs.run_batches(EagerSession(student.folded, student.description, 1), x[:32])
    assert 0 < np.abs(after - before).max() < 0.5 * before.std()
