"""Ranges of a QDQ graph: read from one that was calibrated, and given to the quantizer after a training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.artifact import agreement, onnx_file
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.models import ranges as trained_ranges

if TYPE_CHECKING:
    import onnx

# ONNX Runtime's suffixes of what its quantizer adds for a tensor.
SCALE, QUANTIZED, BEFORE = "_scale", "_quantized", "_QuantizeLinear_Input"


def beside(source: Path) -> dict[str, Any] | None:
    """The trained ranges of an fp32 ONNX, STEM-ranges.json in its folder; None without that file.

    Raises UserError: not such a file, the ranges of other weights.
    """
    path = source.with_name(f"{source.stem}{trained_ranges.SUFFIX}")
    if not path.is_file():
        return None
    ranges = artifacts.read(path, trained_ranges.Ranges, "run quantize and export again")
    got = onnx_file.read_metadata(onnx_file.read_onnx(source)).get("weights_sha256", "none")
    if got != ranges["weights_sha256"]:
        raise UserError(
            f"{path}: got ranges of the weights {ranges['weights_sha256'][:12]}; expected those of {source.name}, "
            f"{got[:12]}; run export again, or remove the ranges to calibrate int8 instead"
        )
    return ranges


def summary(ranges: Mapping[str, Any]) -> str:
    """One line for the metadata: what stayed in float."""
    count = len(ranges["floating"])
    return (
        f"trained ranges, {count} nodes in float" if count else "trained ranges, every node in int8"
    )


def metadata(ranges: Mapping[str, Any]) -> dict[str, str]:
    """Metadata of an int8 network with these ranges: what stayed in float, and the SQNR that its gate goes by."""
    if "sqnr_db" not in ranges:
        return {}  # still in training
    return {"int8": summary(ranges), agreement.TRAINED: repr(ranges["sqnr_db"])}


def read(quantized: onnx.ModelProto) -> tuple[dict[str, Any], dict[str, str]]:
    """The ranges of a QDQ graph for CPUs, by tensor and weight; and of each quantized tensor whose range it has.

    A tensor has another one's range behind a node that only moves or averages values.
    """
    from onnx import numpy_helper

    constants = {w.name: w for w in quantized.graph.initializer}

    def value(name: str) -> Any:
        return numpy_helper.to_array(constants[name])

    activations: dict[str, Any] = {}
    weights: dict[str, Any] = {}
    owners: dict[str, str] = {}
    for node in quantized.graph.node:
        if node.op_type == "QuantizeLinear":
            source, scale, zero_point = node.input
            owner = scale.removesuffix(SCALE)
            owners[source.removesuffix(BEFORE)] = owner
            activations[owner] = {
                "scale": float(value(scale)),
                "zero_point": int(value(zero_point)),
            }
        elif node.op_type == "DequantizeLinear" and node.input[0] in constants:
            stored, scale, _ = node.input
            if value(stored).dtype == np.int8 and value(scale).ndim:
                axis = next(a.i for a in node.attribute if a.name == "axis")
                name = stored.removesuffix(QUANTIZED)
                weights[name] = {"scales": value(scale).tolist(), "axis": int(axis)}
    return {"activations": activations, "weights": weights}, owners


def overrides(
    folded: onnx.ModelProto, ranges: Mapping[str, Any], symmetric: bool
) -> dict[str, list[dict[str, Any]]]:
    """ONNX Runtime's TensorQuantOverrides with exactly these ranges; `symmetric`: on signed grids as wide.

    Raises UserError: ranges of another network.
    """
    tensors = {name for node in folded.graph.node for name in (*node.input, *node.output)}
    nodes = {node.name for node in folded.graph.node}
    named = {*ranges["activations"], *ranges["weights"]}
    if missing := sorted((named - tensors) | (set(ranges["floating"]) - nodes)):
        raise UserError(
            f"trained ranges: got {missing[0]!r}, which the network does not have; expected those of this network "
            "at this opset; run quantize and export again"
        )
    level = np.int8 if symmetric else np.uint8
    result: dict[str, list[dict[str, Any]]] = {}
    for name, grid in ranges["activations"].items():
        scale, zero = grid["scale"], grid["zero_point"]
        if symmetric:
            scale, zero = trained_ranges.symmetric(grid), 0
        result[name] = [{"scale": np.array(scale, np.float32), "zero_point": np.array(zero, level)}]
    for name, grid in ranges["weights"].items():
        scales = np.array(grid["scales"], np.float32)
        zero_point = np.array(0, np.int8)
        result[name] = [
            {"axis": grid["axis"], "scale": scale, "zero_point": zero_point} for scale in scales
        ]
    return result
