"""The simulation of a student's int8: its ONNX, calibrated, and matched to the modules of PyTorch."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact import agreement, inputs, onnx_file
from exporters.artifact.runtime import Calibration
from exporters.artifact.session import Array
from exporters.ort import export
from exporters.ort.placement import place
from exporters.ort.quantize import Calibrated
from exporters.ort.session import OrtSession
from pipeline.models.ranges import SUFFIX
from pipeline.quantize.settings import Quantize

if TYPE_CHECKING:
    import onnx

    from pipeline.quantize.fine_tune import Student
    from pipeline.quantize.simulation import Simulation

IMAGES = 64  # that sensitivities are measured on


@dataclass(frozen=True)
class Layer:
    """A convolution or product with the nodes behind it: SQNR of the logits with this layer alone in int8, dB."""

    name: str
    sqnr_db: float
    floating: bool


def write_onnx(student: Student, folder: Path, opset: int) -> Path:
    """Write student.onnx to `folder`, with the ranges beside it where the student was fine-tuned.

    Raises UserError, GateFailed: not exported.
    """
    source = folder / "student.onnx"
    export.export_model(student.plain, student.description, source, opset)
    ranges = student.path.with_name(f"{student.path.stem}{SUFFIX}")
    if ranges.is_file():
        shutil.copyfile(ranges, source.with_name(f"{source.stem}{SUFFIX}"))
    return source


def simulate(
    student: Student,
    source: Path,
    x: Array,
    settings: Quantize,
    calibration: Calibration,
    judge: bool = True,
) -> tuple[Simulation, list[Layer]]:
    """Build the simulation of a folded student from ranges calibrated on x (N, 3, S, S); also its layers.

    source: its ONNX. The layers are measured where `judge` or the settings ask for it; otherwise there are none.
    Raises UserError: a student that is not quantized.
    """
    import torch

    from pipeline.quantize import simulation

    with Calibrated(onnx_file.read_onnx(source), x, method=calibration) as network:
        sites = simulation.Sites(student.folded, torch.from_numpy(x[:1]))
        judge = judge or settings.floating > 0
        alone = sensitivities(network, x[:IMAGES]) if judge else {}
        floating = floating_groups(list(network.groups), alone, settings)
        placement = place(network, x[:1], sites.computed, floating, settings.bias)
        names = layer_names(network)
    numbers = sites.find(placement.values, placement.owners)
    parameters = simulation.find_weights(student.folded, placement.weights)
    layers = [Layer(names[group], db, group in floating) for group, db in alone.items()]
    return (
        simulation.Simulation(placement.ranges, numbers, parameters, placement.ceilings),
        layers,
    )


def sensitivities(network: Calibrated, x: Array) -> dict[str, float]:
    """Group -> centred SQNR of the logits for x (N, 3, S, S) where that group alone is in int8, dB."""
    reference = _logits(network.folded, x)
    result = {}
    for group in network.groups:
        others = [other for other in network.groups if other != group]
        logits = _logits(network.quantized(others), x)
        metrics, *_ = agreement.compare_outputs(reference, logits, "int8", agreement.Thresholds())
        decibel = metrics["sqnr_centered_db"]
        result[group] = agreement.BIT_EQUAL_DB if decibel is None else decibel
    return result


def floating_groups(groups: list[str], alone: Mapping[str, float], settings: Quantize) -> list[str]:
    """The groups that stay in float by the settings: ends of the network, and the most sensitive others."""
    ends = [groups[0]] * (settings.first == "float") + [groups[-1]] * (settings.last == "float")
    inner = sorted((group for group in alone if group not in ends), key=lambda group: alone[group])
    return [*ends, *inner[: settings.floating]]


def layer_names(network: Calibrated) -> dict[str, str]:
    """Group -> name of its weight without what ONNX Runtime and PyTorch put around the layer's own name."""
    return {
        node.name: node.input[1].removeprefix("ConvMulFusion_W_").removesuffix(".weight")
        for node in network.folded.graph.node
        if node.name in network.groups
    }


def _logits(proto: onnx.ModelProto, x: Array) -> Array:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "network.onnx"
        onnx_file.write_onnx(proto, path)
        return inputs.run_batches(OrtSession(path, 1), x)
