"""What an artefact holds, counted without running it: opset, operators, weights, multiply-accumulates.

An ONNX file by the onnx package, an OpenVINO IR by its XML alone. Counted are convolutions and matrix products
of the main graph (Conv, Gemm, MatMul), for one image; the rest of a CNN is additions and comparisons.
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

BESIDE = {".xml": (".bin",), ".onnx": (".onnx.data", ".onnx_data")}  # where the weights may lie
QDQ = ("QuantizeLinear", "DequantizeLinear", "FakeQuantize")
UNCOUNTED = ("Const", "Parameter", "Result")  # layers of an IR that are no nodes of an ONNX file
INDICES = ("i64", "i32", "u64", "u32", "boolean", "string")  # of an IR: shapes and axes, no weights

Shape = Sequence[int | None]


@dataclass(frozen=True)
class ModelCounts:
    """One artefact; None where its kind of file does not tell."""

    opset: int | None = None  # of an IR its version
    operators: dict[str, int] | None = None  # most frequent first
    params: int | None = None  # values of the weights, folded batch norms gone
    macs: int | None = None  # multiply-accumulates of one image


def count_model(artefact: Path) -> ModelCounts:
    """Of an .onnx or .xml file; nothing but None of another kind, a damaged file, or without onnx installed."""
    readers = {".onnx": _of_onnx, ".xml": _of_ir}
    if artefact.suffix not in readers or not artefact.is_file():
        return ModelCounts()
    try:
        return readers[artefact.suffix](artefact)
    except (UserError, ImportError, ElementTree.ParseError):
        return ModelCounts()


def artefact_files(artefact: Path) -> list[Path]:
    """The files there are of an artefact: itself, and the weights beside it."""
    beside = [artefact.with_suffix(suffix) for suffix in BESIDE.get(artefact.suffix, ())]
    return [path for path in (artefact, *beside) if path.is_file()]


def size_bytes(artefact: Path) -> int | None:
    """Of all its parts; None where there is no file."""
    found = artefact_files(artefact)
    return sum(path.stat().st_size for path in found) if found else None


def _of_onnx(path: Path) -> ModelCounts:
    from exporters.artifact import onnx_file

    model = onnx_file.read_onnx(path)
    scales = {n for node in model.graph.node if node.op_type in QDQ for n in node.input[1:]}
    return ModelCounts(
        opset=onnx_file.opset(model),
        operators=onnx_file.histogram(model),
        params=sum(
            math.prod(w.dims)
            for w in model.graph.initializer
            if w.name not in scales and w.data_type not in _index_types()
        ),
        macs=_onnx_macs(model),
    )


def _index_types() -> set[int]:
    """Data types of shapes and axes, which are no weights."""
    import onnx

    return {onnx.TensorProto.INT64, onnx.TensorProto.BOOL, onnx.TensorProto.STRING}


def _onnx_macs(model: onnx.ModelProto) -> int | None:
    """Multiply-accumulates of one image; None where a shape is unknown or inference does not know an operator."""
    try:
        return _total(_onnx_products(model))
    except Exception:  # shape inference of a foreign network raises whatever it meets
        return None


def _onnx_products(model: onnx.ModelProto) -> Iterator[int | None]:
    """MACs of each Conv, Gemm and MatMul for a batch of 1; a fixed batch counts as so many images."""
    shapes, batch = _onnx_shapes(model)
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        taken, weight = (shapes.get(name, [None]) for name in node.input[:2])
        made = shapes.get(node.output[0], [None])
        flags = {a.name: a.i for a in node.attribute}
        if node.op_type == "Conv":
            depth: Shape = weight[1:]
        else:
            depth = [(taken or [None])[0 if flags.get("transA") else -1]]
        yield _product([*made, *depth], batch)


def _onnx_shapes(model: onnx.ModelProto) -> tuple[dict[str, Shape], int]:
    """Shape of every tensor with the free batch set to 1, and the images of a call."""
    import onnx

    graph = model.graph
    weights = {w.name: list(w.dims) for w in graph.initializer}
    taken = next(i for i in graph.input if i.name not in weights)
    first = taken.type.tensor_type.shape.dim[0]
    batch = first.dim_value or 1
    first.dim_value = batch
    del graph.value_info[:]
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True).graph
    shapes: dict[str, Shape] = dict(weights)
    for value in (*inferred.value_info, *inferred.input, *inferred.output):
        dims = value.type.tensor_type.shape.dim
        shapes[value.name] = [d.dim_value if d.HasField("dim_value") else None for d in dims]
    return shapes, batch


def _product(dims: Shape, batch: int) -> int | None:
    """All dimensions multiplied, a call's images divided out; None where one is unknown."""
    known = [d for d in dims if d is not None]
    return math.prod(known) // batch if len(known) == len(dims) else None


def _total(products: Iterator[int | None]) -> int | None:
    """Their sum, None where one of them is unknown."""
    found = list(products)
    known = [p for p in found if p is not None]
    return sum(known) if len(known) == len(found) else None


def _of_ir(path: Path) -> ModelCounts:
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
        macs=_total(_ir_products(layers.values())),
    )


def _ir_products(layers: Iterable[ElementTree.Element]) -> Iterator[int | None]:
    """MACs of each convolution and product; a free batch is 1."""
    layers = list(layers)
    pictures = next((_ports(x, "output")[0] for x in layers if x.get("type") == "Parameter"), [1])
    batch = pictures[0] or 1
    for layer in layers:
        kind = layer.get("type")
        if kind not in ("Convolution", "GroupConvolution", "MatMul"):
            continue
        (taken, weight), (made,) = _ports(layer, "input"), _ports(layer, "output")
        if kind == "MatMul":
            data = layer.find("data")
            turned = data is not None and data.get("transpose_a") == "true"
            depth = taken[-2:-1] if turned else taken[-1:]
        else:
            depth = weight[1 if kind == "Convolution" else 2 :]
        yield _product([made[0] or 1, *made[1:], *depth], batch)


def _ports(layer: ElementTree.Element, side: str) -> list[list[int | None]]:
    """Shape of each port of that side; None where a dimension is free."""
    ports = layer.find(side)
    found = [] if ports is None else ports.findall("port")
    dims = [[int(d.text or -1) for d in port.findall("dim")] for port in found]
    return [[d if d >= 0 else None for d in shape] for shape in dims]
