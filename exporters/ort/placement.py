"""Where the int8 graph of a student rounds: calibrated ranges of the tensors that PyTorch shows as well."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from exporters.artifact.session import Array
from exporters.ort import trained
from exporters.ort.quantize import PRODUCTS, Calibrated, quantizable
from exporters.parity.layers import tapped

if TYPE_CHECKING:
    import onnx

KEEPING = (*PRODUCTS, "Clip")  # what they read beside the activation does not keep them from int8


@dataclass(frozen=True)
class Placement:
    """Calibrated ranges, and what the simulation must know of the graph.

    owners: quantized tensor -> tensor whose range it has. values: the quantized tensors for one image, in graph
    order. weights: the quantized ones, in float. ceilings: tensor -> largest value that the clip before it, which
    int8 takes over, lets through.
    """

    ranges: dict[str, Any]
    owners: dict[str, str]
    values: dict[str, Array]
    weights: dict[str, Array]
    ceilings: dict[str, float]


def place(
    calibrated: Calibrated,
    x: Array,
    visible: Callable[[Mapping[str, Array]], Collection[str]],
    floating: Collection[str],
    bias: str,
) -> Placement:
    """Quantize what the student's PyTorch network shows as well, and leave the rest in float.

    `visible` names those of the tensors, given with their values for one image x (1, 3, S, S), that an operator
    of PyTorch computes: what one computes is not cut in two by a rounding. floating: groups left in float.
    """
    from onnx import numpy_helper

    graph = calibrated.folded.graph
    nodes = [node for group in floating for node in calibrated.groups[group]]
    rounded = [node for node in graph.node if node.op_type in quantizable()]
    constants = {w.name: w for w in graph.initializer}
    nodes += [n.name for n in rounded if n.op_type not in KEEPING and _reads_float(n, constants)]
    while True:
        fixed = {"floating": sorted(set(nodes)), "bias": bias}
        chosen: dict[str, Any] = {"activations": {}, "weights": {}, **fixed}
        ranges, owners = trained.read(calibrated.quantized(ranges=chosen))
        names = [name for node in graph.node for name in node.output if name in owners]
        image = graph.input[0].name
        values = {image: x} if image in owners else {}  # the first layer may be in float
        values |= dict(zip(names, tapped(calibrated.folded, names)(x), strict=True))
        hidden = set(values) - set(visible(values))
        cut = [n.name for n in rounded if hidden & {*n.input, *n.output}]
        if set(cut) <= set(nodes):
            break
        nodes += cut
    return Placement(
        {**ranges, **fixed},
        owners,
        values,
        {name: numpy_helper.to_array(constants[name]) for name in ranges["weights"]},
        _ceilings(calibrated.folded),
    )


def _reads_float(node: onnx.NodeProto, constants: Mapping[str, onnx.TensorProto]) -> bool:
    """Whether a node reads a weight or a constant: GELU's x * 0.5, LayerNorm's scale."""
    from onnx import TensorProto

    return any(constants[i].data_type == TensorProto.FLOAT for i in node.input if i in constants)


def _ceilings(model: onnx.ModelProto) -> dict[str, float]:
    """Output of a Clip -> its upper bound."""
    from onnx import numpy_helper

    constants = {w.name: w for w in model.graph.initializer}
    clips = [n for n in model.graph.node if n.op_type == "Clip" and len(n.input) == 3]
    return {
        n.output[0]: float(numpy_helper.to_array(constants[n.input[2]]))
        for n in clips
        if n.input[2] in constants
    }
