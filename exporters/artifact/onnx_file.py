"""One ONNX file: read and checked, written whole, with its metadata, opset and operators."""

from __future__ import annotations

import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact.session import validate_inputs, validate_output, validated_shape
from exporters.device.errors import one_line
from pipeline.core.errors import GateFailed, UserError
from pipeline.models.ranges import SUFFIX

if TYPE_CHECKING:
    import onnx

PARITY = "parity.json"  # of the build that a file lies in
MAX_PROTO_BYTES = 2**31  # protobuf's limit of one message


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
        raise UserError(f"{path}: no such file; expected an .onnx file; check the path")
    try:
        model = onnx.load(path, format="protobuf")
        onnx.checker.check_model(model)
    except (DecodeError, onnx.checker.ValidationError, FileNotFoundError) as error:
        raise UserError(
            f"{path}: not a valid ONNX file ({str(error)[:300]}); export it again"
        ) from None
    if not model.graph.node:
        raise UserError(f"{path}: got a graph without nodes; expected a network; export it again")
    for entry in model.metadata_props:
        if not isinstance(entry.key, str) or not isinstance(entry.value, str):
            raise UserError(f"{path}: metadata {entry.key!r} is not UTF-8 text; export it again")
    return model


def write_onnx(proto: onnx.ModelProto, path: Path) -> None:
    """Write one self-contained file, after onnx.checker.

    Raises UserError: above ONNX's 2 GB, or shapes that contradict each other.
    """
    import onnx

    if (size := proto.ByteSize()) >= MAX_PROTO_BYTES:
        raise UserError(
            f"{path}: network of {size:,} bytes; one ONNX file holds 2 GB at most; use a smaller model"
        )
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise UserError(
            f"{path.name}: not a valid network ({str(error)[:300]}); export the source again"
        ) from None
    path.write_bytes(proto.SerializeToString(deterministic=True))


@contextmanager
def working_copy(path: Path) -> Iterator[Path]:
    """A path of the same name, to be written, in a temporary folder; errors name `path` instead.

    What is read beside an ONNX file lies there too: its trained ranges, and the parity.json of its build.
    """
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / path.name
        for name in (f"{path.stem}{SUFFIX}", PARITY):
            if (companion := path.with_name(name)).is_file():
                shutil.copyfile(companion, copy.with_name(name))
        try:
            yield copy
        except (UserError, GateFailed) as error:
            if folder not in str(error):
                raise
            text = str(error).replace(str(copy), str(path)).replace(folder, str(path.parent))
            raise type(error)(text) from None


def classifier_input_shape(proto: onnx.ModelProto, path: Path) -> tuple[int | None, int, int, int]:
    """The shape of the one input that is no weight, (B or None, 3, H, W), as `session.validated_shape`.

    Raises UserError: none or several, another type than float32, another shape, a first output that is no logits.
    """
    weights = {w.name for w in proto.graph.initializer}
    entries = [i for i in proto.graph.input if i.name not in weights]
    validate_inputs([(i.name, _type_name(i)) for i in entries], path)
    shape = validated_shape(_dims(entries[0]), read_metadata(proto), path)
    output = proto.graph.output[0]
    validate_output(_type_name(output), _dims(output), shape, path)
    return shape


def _type_name(value: onnx.ValueInfoProto) -> str:
    """`tensor(float)`: the type as ONNX Runtime writes it."""
    import onnx

    name = onnx.TensorProto.DataType.Name(value.type.tensor_type.elem_type)
    return f"tensor({name.lower()})"


def _dims(value: onnx.ValueInfoProto) -> list[int | None]:
    shape = value.type.tensor_type.shape
    return [d.dim_value if d.HasField("dim_value") else None for d in shape.dim]


def replace_metadata(proto: onnx.ModelProto, properties: Mapping[str, str]) -> onnx.ModelProto:
    """Set the metadata and remove the exporter's own, which holds source paths of the exporting machine."""
    import onnx

    graph = proto.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info):
        part.ClearField("metadata_props")
        part.ClearField("doc_string")
    for weight in graph.initializer:
        weight.ClearField("metadata_props")
    onnx.helper.set_model_props(proto, dict(properties))
    return proto


def add_metadata(proto: onnx.ModelProto, **properties: str) -> onnx.ModelProto:
    """`proto` with these entries beside its own metadata."""
    import onnx

    onnx.helper.set_model_props(proto, {**read_metadata(proto), **properties})
    return proto


def read_metadata(proto: onnx.ModelProto) -> dict[str, str]:
    """The flat metadata of `exporters.artifact.metadata` it carries."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def opset(proto: onnx.ModelProto) -> int:
    """The version of the standard operator set."""
    return next(int(e.version) for e in proto.opset_import if e.domain in ("", "ai.onnx"))


def histogram(proto: onnx.ModelProto) -> dict[str, int]:
    """Operators of the graph, most frequent first."""
    return dict(Counter(node.op_type for node in proto.graph.node).most_common())
