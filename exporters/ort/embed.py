"""Normalisation inside the network: an ONNX that takes decoded uint8 pixels. Resizing stays outside."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from exporters.artifact import onnx_file

if TYPE_CHECKING:
    import onnx

PIXELS = "pixels"


def embed_normalisation(
    proto: onnx.ModelProto, mean: list[float], std: list[float]
) -> onnx.ModelProto:
    """Prepend /255, minus mean, over std to the network, as `pipeline.data.prepared.normalised` computes."""
    from onnx import TensorProto, helper, numpy_helper

    copy = type(proto)()
    copy.CopyFrom(proto)
    graph = copy.graph
    entry = graph.input[0]
    axes = entry.type.tensor_type.shape.dim
    dims = [d.dim_value if d.HasField("dim_value") else d.dim_param or None for d in axes]
    shape = [dims[0], *dims[2:], dims[1]]
    values = {"pixels/255": [255.0], "pixels/mean": mean, "pixels/std": std}
    constants = [
        numpy_helper.from_array(np.array(v, np.float32), name) for name, v in values.items()
    ]
    steps = [
        helper.make_node("Cast", [PIXELS], ["pixels/float"], to=TensorProto.FLOAT),
        helper.make_node("Div", ["pixels/float", "pixels/255"], ["pixels/unit"]),
        helper.make_node("Sub", ["pixels/unit", "pixels/mean"], ["pixels/centred"]),
        helper.make_node("Div", ["pixels/centred", "pixels/std"], ["pixels/normal"]),
        helper.make_node("Transpose", ["pixels/normal"], [entry.name], perm=[0, 3, 1, 2]),
    ]
    for step in steps:
        step.name = step.output[0]
    nodes = [*steps, *graph.node]
    del graph.node[:], graph.input[:]
    graph.node.extend(nodes)
    graph.input.append(helper.make_tensor_value_info(PIXELS, TensorProto.UINT8, shape))
    graph.initializer.extend(constants)
    return onnx_file.add_metadata(copy, input="uint8 RGB (B, S, S, 3), normalised inside")
