"""One ONNX file: read and checked, its notes, its opset and operators, written whole."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact.session import validate_output, validated_shape
from exporters.device.errors import one_line
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

MAX_PROTO_BYTES = 2**31  # bytes of one protobuf message


@contextmanager
def library_errors(model: onnx.ModelProto, precision: str) -> Iterator[None]:
    """Raise UserError, with the node that it names, for whatever a converter or quantizer raises in the body."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # libraries raise what a foreign network leads them to
        where = _suspect_nodes(model, str(error))
        raise UserError(
            f"--precision {precision}: got {type(error).__name__} from the converter ({one_line(error)}){where}; "
            f"expected a network it can convert; leave {precision} out"
        ) from None


def _suspect_nodes(model: onnx.ModelProto, text: str) -> str:
    """The first node whose name or tensors an error's text quotes; else the operators of foreign domains."""
    words = set(re.findall(r"[\w./:-]+", text))
    for node in model.graph.node:
        if words & {node.name, *node.input, *node.output} - {""}:
            return f" at node {node.name or node.output[0]!r} ({node.op_type})"
    foreign = dict.fromkeys(
        f"{node.domain}.{node.op_type}" for node in model.graph.node if node.domain
    )
    return f"; it holds {', '.join(foreign)}" if foreign else ""


def read_onnx(path: Path) -> onnx.ModelProto:
    """Load an ONNX file with its weights.

    Raises UserError: missing, not ONNX, empty, weights in a lost or foreign file, metadata that is not text.
    """
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an .onnx file")
    try:
        model = onnx.load(path, format="protobuf")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, FileNotFoundError) as error:
        raise UserError(f"{path}: not a valid ONNX file ({str(error)[:300]})") from None
    if not model.graph.node:
        raise UserError(f"{path}: holds no node; expected a network")
    for note in model.metadata_props:
        if not isinstance(note.key, str) or not isinstance(note.value, str):
            raise UserError(f"{path}: its metadata {note.key!r} is not text; export it again")
    return model


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """Write one self-contained file, after onnx.checker.

    Raises UserError: above ONNX's 2 GB, or shapes that contradict each other.
    """
    import onnx

    if proto.ByteSize() >= MAX_PROTO_BYTES:
        raise UserError(f"{path}: the network is larger than the 2 GB one ONNX file may hold")
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(f"{path.name}: not a valid network ({str(error)[:300]})") from None
    path.write_bytes(proto.SerializeToString(deterministic=True))


def classifier_input_shape(proto: onnx.ModelProto, path: Path) -> tuple[int | None, int, int, int]:
    """The shape of the one input that is no weight, (B or None, 3, H, W), as `session.validated_shape`.

    Raises UserError: none or several, another type than float32, another shape, a first output that is no logits.
    """
    weights = {w.name for w in proto.graph.initializer}
    taken = [i for i in proto.graph.input if i.name not in weights]
    if [_kind(i) for i in taken] != ["tensor(float)"]:
        listed = ", ".join(f"{i.name} {_kind(i)}" for i in taken)
        raise UserError(f"{path}: inputs are {listed}; allowed: one float32 image input")
    shape = validated_shape(_dims(taken[0]), read_metadata(proto), path)
    made = proto.graph.output[0]
    validate_output(_kind(made), _dims(made), shape, path)
    return shape


def _kind(value: onnx.ValueInfoProto) -> str:
    """`tensor(float)`: the type as ONNX Runtime writes it."""
    import onnx

    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return f"tensor({name.lower()})"


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    shape = value.type.tensor_type.shape
    return [d.dim_value if d.HasField("dim_value") else None for d in shape.dim]


def replace_metadata(proto: onnx.ModelProto, notes: Mapping[str, str]) -> onnx.ModelProto:
    """Put the notes in; take out the exporter's own: source paths of the machine that exported."""
    import onnx

    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for weight in graph.initializer:
        weight.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, dict(notes))
    return proto


def add_metadata(proto: onnx.ModelProto, **more: str) -> onnx.ModelProto:
    """`proto` with these notes beside its own."""
    import onnx

    onnx.helper.set_model_props(proto, {**read_metadata(proto), **more})
    return proto


def read_metadata(proto: onnx.ModelProto) -> dict[str, str]:
    """The flat notes of `exporters.artifact.metadata` it carries."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operator set."""
    return next(int(e.version) for e in proto.opset_import if e.domain in ("", "ai.onnx"))


def histogram(proto: onnx.ModelProto) -> dict[str, int]:
    """Operators of the graph, most frequent first."""
    return dict(Counter(node.op_type for node in proto.graph.node).most_common())
