"""Static counts of an artefact: opset, operators, parameters, multiply-accumulates (MACs).

An ONNX file is read by the onnx package, an OpenVINO IR by its XML alone. MACs are those of convolutions and
matrix products of the main graph (Conv, Gemm, MatMul), for one image; the rest of a CNN is additions.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

WEIGHT_SUFFIXES = {".xml": (".bin",), ".onnx": (".onnx.data", ".onnx_data")}
QDQ = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize")
# Layers of an IR that are no nodes of an ONNX file, and element types that hold shapes and axes, no weights.
UNCOUNTED = ("Const", "Parameter", "Result")
INDICES = ("i64", "i32", "u64", "u32", "boolean", "string")

Shape = Sequence[int | None]


@dataclass(frozen=True)
class ModelCounts:
    """Counts of one artefact; None where its kind of file does not have them."""

    opset: int | None = None  # of an IR its version
    operators: dict[str, int] | None = None  # most frequent first
    params: int | None = None  # values of the weights, batch norms folded
    macs: int | None = None  # of one image


def count_model(artefact: Path) -> ModelCounts:
    """Counts of an .onnx or .xml file; all None for another kind, a damaged file, or without onnx installed."""
    readers = {".onnx": _count_onnx, ".xml": _count_ir}
    if artefact.suffix not in readers or not artefact.is_file():
        return ModelCounts()
    try:
        return readers[artefact.suffix](artefact)
    except (UserError, ImportError, ElementTree.ParseError):
        return ModelCounts()


def artefact_files(artefact: Path) -> list[Path]:
    """The existing files of an artefact: itself, and the weights beside it."""
    weights = [artefact.with_suffix(suffix) for suffix in WEIGHT_SUFFIXES.get(artefact.suffix, ())]
    return [path for path in (artefact, *weights) if path.is_file()]


def size_bytes(artefact: Path) -> int | None:
    """Bytes of all its files; None where there is none."""
    files = artefact_files(artefact)
    return sum(path.stat().st_size for path in files) if files else None


def _count_onnx(path: Path) -> ModelCounts:
    from onnx import TensorProto

    from exporters.artifact import onnx_file

    model = onnx_file.read_onnx(path)
    # Scales, zero points, shapes and axes are initializers too, but no weights.
    scales = {n for node in model.graph.node if node.op_type in QDQ for n in node.input[1:]}
    index_types = (TensorProto.INT64, TensorProto.BOOL, TensorProto.STRING)
    return ModelCounts(
        opset=onnx_file.opset(model),
        operators=onnx_file.histogram(model),
        params=sum(
            math.prod(w.dims)
            for w in model.graph.initializer
            if w.name not in scales and w.data_type not in index_types
        ),
        macs=_total_macs(model),
    )


def _total_macs(model: onnx.ModelProto) -> int | None:
    """Multiply-accumulates of one image; None where a shape is unknown or inference does not know an operator."""
    try:
        return _sum_known(_onnx_macs(model))
    except Exception:  # shape inference of a foreign network raises whatever it meets
        return None


def _onnx_macs(model: onnx.ModelProto) -> Iterator[int | None]:
    """MACs of each Conv, Gemm and MatMul for one image."""
    shapes, batch = _onnx_shapes(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        data, weight = (shapes.get(name, [None]) for name in node.input[:2])
        output = shapes.get(node.output[0], [None])
        flags = {a.name: a.i for a in node.attribute}
        if node.op_type == "Conv":
            depth: Shape = weight[1:]
        else:
            depth = [(data or [None])[0 if flags.get("transA") else -1]]
        yield _macs([*output, *depth], batch)


def _onnx_shapes(model: onnx.ModelProto) -> tuple[dict[str, Shape], int]:
    """Shape of every tensor with a dynamic batch set to 1, and the images of a call."""
    import onnx

    graph = model.graph
    weights = {w.name: list(w.dims) for w in graph.initializer}
    image = next(i for i in graph.input if i.name not in weights)
    first = image.type.tensor_type.shape.dim[0]
    batch = first.dim_value or 1
    first.dim_value = batch
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = dict(weights)
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return shapes, batch


def _macs(dims: Shape, batch: int) -> int | None:
    """Product of the dimensions, per image of a call; None where one is unknown."""
    known = [d for d in dims if d is not None]
    return math.prod(known) // batch if len(known) == len(dims) else None


def _sum_known(values: Iterator[int | None]) -> int | None:
    """The sum, None where one of the values is unknown."""
    listed = list(values)
    known = [value for value in listed if value is not None]
    return sum(known) if len(known) == len(listed) else None


def _count_ir(path: Path) -> ModelCounts:
    root = ElementTree.parse(path).getroot()
    layers = {layer.get("id"): layer for layer in root.iter("layer")}
    kinds = Counter(layer.get("type", "") for layer in layers.values())
    scales = {
        edge.get("from-layer")
        for edge in root.iter("edge")
        if layers[edge.get("to-layer")].get("type") == "FakeQuantize" and edge.get("to-port") != "0"
    }
    constants = [
        layer.find("data")
        for name, layer in layers.items()
        if layer.get("type") == "Const" and name not in scales
    ]
    return ModelCounts(
        opset=int(root.get("version", 0)) or None,
        operators={k: n for k, n in kinds.most_common() if k not in UNCOUNTED},
        params=sum(
            math.prod(int(n) for n in data.get("shape", "").split(",") if n.strip())
            for data in constants
            if data is not None and data.get("element_type") not in INDICES
        ),
        macs=_sum_known(_ir_macs(list(layers.values()))),
    )


def _ir_macs(layers: Iterable[ElementTree.Element]) -> Iterator[int | None]:
    """MACs of each convolution and product for one image."""
    images = next((_ports(x, "output")[0] for x in layers if x.get("type") == "Parameter"), [1])
    batch = images[0] or 1
    for layer in layers:
        kind = layer.get("type")
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        (data, weight), (output,) = _ports(layer, "input"), _ports(layer, "output")
        if kind == "MatMul":
            attributes = layer.find("data")
            transposed = attributes is not None and attributes.get("transpose_a") == "true"
            depth = data[-2:-1] if transposed else data[-1:]
        else:
            depth = weight[1 if kind == "Convolution" else 2 :]
        yield _macs([output[0] or 1, *output[1:], *depth], batch)


def _ports(layer: ElementTree.Element, side: str) -> list[list[int | None]]:
    """Shape of each port of that side; None where a dimension is dynamic (-1 in the XML)."""
    ports = layer.findall(f"{side}/port")
    shapes = [[int(dim.text or -1) for dim in port.findall("dim")] for port in ports]
    return [[dim if dim >= 0 else None for dim in shape] for shape in shapes]
