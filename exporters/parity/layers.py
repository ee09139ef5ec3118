"""Comparison of two ONNX files node by node: the outputs that both name, on the same images."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import agreement, onnx_file
from exporters.artifact.session import Array
from exporters.ort.session import OrtSession
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

IMAGES = 4
MAX_LINES = 8
DEQUANTIZED = "_DequantizeLinear_Output"  # ONNX Runtime's suffix of a tensor after its quantization
# SQNR below these differs by more than the rounding of that precision.
DIVERGED_DB = {"fp32": 80.0, "fp16": 35.0, "bf16": 25.0, "int8": 15.0}


def compare_layers(a: Path, b: Path, images: Path | None) -> None:
    """Print the common node outputs that differ, in A's order, the first one by name.

    Raises UserError: not two ONNX files, no common output, fixed batches that differ.
    """
    for path in (a, b):
        if path.suffix != ".onnx":
            raise UserError(f"--layers: got {path}; expected two .onnx files; leave --layers out")
    first, second = onnx_file.read_onnx(a), onnx_file.read_onnx(b)
    pairs = shared_outputs(first, second)
    if not pairs:
        raise UserError(
            f"--layers: got {a} and {b} without a node output of the same name; expected one or more; "
            "leave --layers out"
        )
    sessions = OrtSession(a, 1), OrtSession(b, 1)
    x = agreement.comparison_images(*sessions, images)
    floor = DIVERGED_DB[agreement.coarsest_precision(*sessions)]
    batches = {session.input_shape[0] for session in sessions} - {None}
    if len(batches) > 1:
        raise UserError(
            f"--layers: got fixed batches {sorted(filter(None, batches))}; expected one batch size; "
            "leave --layers out"
        )
    batch = batches.pop() or 1 if batches else 1
    run_a = tapped(first, [pair[0] for pair in pairs.values()])
    run_b = tapped(second, [pair[1] for pair in pairs.values()])
    sums = {name: np.zeros(2) for name in pairs}
    for chunk in np.split(x, range(batch, min(len(x), IMAGES), batch)):
        outputs = run_a(chunk[:batch]), run_b(chunk[:batch])
        for name, a_value, b_value in zip(pairs, *outputs, strict=True):
            sums[name] += energies(a_value, b_value)
    sqnr = {name: decibel(*both) for name, both in sums.items() if not np.isnan(both).any()}
    diverged = [(name, db) for name, db in sqnr.items() if db < floor]
    print(f"{len(sqnr)} node outputs of the same name, {len(diverged)} below {floor:g} dB")
    if diverged:
        print(f"first divergence: {diverged[0][0]}")
    worst = diverged[:MAX_LINES] or sorted(sqnr.items(), key=lambda item: item[1])[:MAX_LINES]
    for name, db in worst:
        print(f"  {db:7.1f} dB  {name}")


def shared_outputs(a: onnx.ModelProto, b: onnx.ModelProto) -> dict[str, tuple[str, str]]:
    """Node outputs named in both graphs, in A's order -> the tensor to read in A and in B.

    Of a quantized tensor that is the dequantized one: the quantizer may have dropped the ReLU before it.
    """
    names_a, names_b = node_outputs(a), node_outputs(b)
    return {
        name: (_dequantized(name, names_a), _dequantized(name, names_b))
        for name in names_a
        if name in names_b
    }


def node_outputs(model: onnx.ModelProto) -> dict[str, None]:
    """Names of all node outputs, in graph order."""
    return dict.fromkeys(name for node in model.graph.node for name in node.output if name)


def _dequantized(name: str, names: dict[str, None]) -> str:
    return name + DEQUANTIZED if name + DEQUANTIZED in names else name


def tapped(model: onnx.ModelProto, names: list[str]) -> Callable[[Array], list[NDArray[Any]]]:
    """A function of x that returns the named node outputs, run without graph optimization."""
    import onnx
    import onnxruntime as ort

    copy = type(model)()
    copy.CopyFrom(model)
    del copy.graph.output[:]
    copy.graph.output.extend(onnx.helper.make_empty_tensor_value_info(n) for n in set(names))
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(
        copy.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    entry = session.get_inputs()[0].name
    return lambda x: session.run(names, {entry: x})


def energies(a: NDArray[Any], b: NDArray[Any]) -> tuple[float, float]:
    """Energy of A and of the difference A - B, as sums of squares.

    The difference is infinite for another shape or a value that is not finite; both are NaN where there is
    nothing to compare (shapes and indices, int8 codes).
    """
    if a.dtype.kind != "f" or b.dtype.kind != "f":
        return math.nan, math.nan
    if a.shape != b.shape or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return 0.0, math.inf
    signal, noise = a.astype(np.float32), a.astype(np.float32) - b
    return float(np.vdot(signal, signal)), float(np.vdot(noise, noise))


def decibel(signal: float, noise: float) -> float:
    """SQNR in dB: BIT_EQUAL_DB for equal tensors, -inf for a difference that is not finite."""
    if noise == 0:
        return agreement.BIT_EQUAL_DB
    return 10 * math.log10(signal / noise) if signal and math.isfinite(noise) else -math.inf
