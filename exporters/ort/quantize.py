"""ONNX -> ONNX at a lower precision: fp16, and int8 as explicit QDQ for CPUs or for TensorRT. Torch-free.

int8 is two artefacts. CPUs: u8 asymmetric activations, s8 weights per channel. TensorRT: s8 symmetric for
both and a float bias; it rejects ONNX Runtime's default, and x86 runs s8 activations two to three times slower.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters.artifact import inputs, onnx_file
from exporters.artifact.quiet import quiet
from exporters.artifact.session import Array
from exporters.ort import trained
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

WEIGHTS = "int8-weights"  # the precision of `with_int8_weights`
METHODS = {"minmax": "MinMax", "percentile": "Percentile", "entropy": "Entropy"}
PRODUCTS = ("Conv", "ConvTranspose", "Gemm", "MatMul")
PER_CHANNEL_OPSET = 13  # the first whose QuantizeLinear takes an axis
FOLDED_OPSET = 17  # what older models are converted to


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights and arithmetic in fp16; inputs and outputs stay float32."""
    from onnxruntime.transformers.float16 import convert_float_to_float16
    from onnxruntime.transformers.onnx_model import OnnxModel

    with onnx_file.library_errors(model, "fp16"), quiet():
        half = convert_float_to_float16(fold(model), keep_io_types=True)
        OnnxModel.graph_topological_sort(half.graph)  # the converter appends the input's Cast last
    return _with_metadata(half, model, "fp16")


def with_int8_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """Weights of convolutions and products as s8, a scale per output channel; arithmetic stays in float32."""
    from onnx import helper, numpy_helper

    with onnx_file.library_errors(model, "int8-weights"):
        folded = fold(model)
    graph = folded.graph
    weights = {w.name: numpy_helper.to_array(w) for w in graph.initializer}
    axes = {n.input[1]: _channel_axis(n) for n in graph.node if n.op_type in PRODUCTS}
    nodes, kept = [], [w for w in graph.initializer if w.name not in axes]
    for name, axis in axes.items():
        if name not in weights or weights[name].dtype != np.float32:
            continue
        others = tuple(d for d in range(weights[name].ndim) if d != axis)
        scales = np.maximum(np.abs(weights[name]).max(axis=others), 1e-30) / np.float32(127)
        shape = [-1 if d == axis else 1 for d in range(weights[name].ndim)]
        levels = np.rint(weights[name] / scales.reshape(shape)).astype(np.int8)
        parts = {f"{name}_quantized": levels, f"{name}_scale": scales}
        kept += [numpy_helper.from_array(value, part) for part, value in parts.items()]
        nodes.append(helper.make_node("DequantizeLinear", [*parts], [name], f"{name}_d", axis=axis))
    nodes += graph.node
    del graph.node[:], graph.initializer[:]
    graph.node.extend(nodes)
    graph.initializer.extend(kept)
    return onnx_file.add_metadata(_with_metadata(folded, model, "int8"), int8="weights only")


def _channel_axis(node: onnx.NodeProto) -> int:
    """The axis of the output channels in the weight of a convolution or product."""
    transposed = any(a.name == "transB" and a.i for a in node.attribute)
    return 0 if node.op_type == "Conv" or transposed else 1


def to_int8(
    model: onnx.ModelProto, x: Array, symmetric: bool = False, method: str = "minmax"
) -> onnx.ModelProto:
    """Explicit QDQ of every node that has one, ranges from x (N, 3, S, S); `symmetric` for TensorRT."""
    with Calibrated(model, x, symmetric, method) as calibrated:
        return calibrated.quantized()


def at_precision(
    model: onnx.ModelProto,
    precision: str,
    x: Array | None,
    ranges: Mapping[str, Any] | None = None,
) -> onnx.ModelProto:
    """The network at a precision; int8 as TensorRT takes it, with trained ranges, or those of x (N, 3, S, S)."""
    if precision == "fp16":
        return to_fp16(model)
    if x is None or precision != "int8":
        return model
    with Calibrated(model, x, symmetric=True) as calibrated:
        return calibrated.quantized(ranges=ranges)


class Calibrated:
    """A network with its activation ranges, which are measured once and reused by each `quantized` call."""

    def __init__(
        self, model: onnx.ModelProto, x: Array, symmetric: bool = False, method: str = "minmax"
    ) -> None:
        self.source, self.symmetric = model, symmetric
        with onnx_file.library_errors(model, "int8"):
            self.folded = _with_unique_names(fold(model))
        self.groups = groups(self.folded)
        self._x, self._method = x, METHODS[method]
        self._folder = tempfile.TemporaryDirectory()

    def __enter__(self) -> Calibrated:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    def quantized(
        self, floating: Sequence[str] = (), ranges: Mapping[str, Any] | None = None
    ) -> onnx.ModelProto:
        """The network in int8, except the groups named in `floating`; with the `ranges` of a training."""
        from onnxruntime import quantization as q

        kind = q.QuantType.QInt8 if self.symmetric else q.QuantType.QUInt8
        options: dict[str, Any] = {
            "ActivationSymmetric": self.symmetric,
            "WeightSymmetric": True,
            "QuantizeBias": not self.symmetric,
        }
        excluded = [node for group in floating for node in self.groups[group]]
        excluded += _constant_operands(self.folded) if self.symmetric else []
        if ranges is not None:
            options["TensorQuantOverrides"] = trained.overrides(self.folded, ranges, self.symmetric)
            options["QuantizeBias"] = not self.symmetric and ranges["bias"] == "int32"
            excluded += ranges["floating"]
        path = Path(self._folder.name) / "int8.onnx"
        # A copy, because the quantizer moves its weights into files that are gone afterwards.
        copy = type(self.folded)()
        copy.CopyFrom(self.folded)
        with onnx_file.library_errors(self.folded, "int8"), quiet():
            q.quantize_static(
                copy,
                path,
                _calibration_reader(self.folded, self._x),
                per_channel=True,
                activation_type=kind,
                weight_type=q.QuantType.QInt8,
                op_types_to_quantize=quantizable(),
                nodes_to_exclude=excluded,
                calibrate_method=q.CalibrationMethod[self._method],
                calibration_cache_path=Path(self._folder.name) / "ranges.json",
                extra_options=options,
            )
        made = _with_metadata(onnx_file.read_onnx(path), self.source, "int8")
        return made if ranges is None else onnx_file.add_metadata(made, **trained.metadata(ranges))


def groups(model: onnx.ModelProto) -> dict[str, list[str]]:
    """Each convolution or product with the nodes that follow it until the next: group name -> node names.

    A node with several ancestors belongs to the last of them in graph order, one without any to the first.
    """
    members: dict[str, list[str]] = {}
    order: list[str] = []
    owner: dict[str, int] = {}  # tensor -> index of its group in `order`
    for node in model.graph.node:
        if node.op_type in PRODUCTS:
            order.append(node.name)
        if not order:
            continue
        if node.op_type in PRODUCTS:
            group = len(order) - 1
        else:
            group = max((owner.get(t, 0) for t in node.input), default=0)
        members.setdefault(order[group], []).append(node.name)
        owner |= dict.fromkeys(node.output, group)
    return members


def _with_unique_names(model: onnx.ModelProto) -> onnx.ModelProto:
    """Every node with a unique name: the quantizer excludes nodes by name."""
    names: set[str] = set()
    for i, node in enumerate(model.graph.node):
        if not node.name or node.name in names:
            node.name = f"{node.name or node.op_type}, number {i}"
        names.add(node.name)
    return model


def fold(model: onnx.ModelProto) -> onnx.ModelProto:
    """Fold constants and batch norms, at opset 13 or later, as the fp16 and int8 converters expect."""
    import onnx
    import onnxruntime as ort

    domains = {entry.domain for entry in model.opset_import}
    if onnx_file.opset(model) < PER_CHANNEL_OPSET:
        converted = onnx.version_converter.convert_version(model, FOLDED_OPSET)
        _prove_conversion(model, converted)
        model = converted
    model = _without_weights_as_inputs(model)
    with tempfile.TemporaryDirectory() as folder:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        options.optimized_model_filepath = str(Path(folder) / "folded.onnx")
        ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
        folded = onnx.load(options.optimized_model_filepath)
    # ONNX Runtime lists all its own domains, which other runtimes reject as unknown.
    opsets = [entry for entry in folded.opset_import if entry.domain in domains]
    del folded.opset_import[:]
    folded.opset_import.extend(opsets)
    return folded


def _prove_conversion(source: onnx.ModelProto, converted: onnx.ModelProto) -> None:
    """Raise UserError where a network answers otherwise after the conversion of its opset."""
    import onnxruntime as ort

    outputs = []
    for model in (source, converted):
        options = ort.SessionOptions()
        options.log_severity_level = 3
        bare = _without_weights_as_inputs(model).SerializeToString()
        session = ort.InferenceSession(bare, options, providers=["CPUExecutionProvider"])
        entry = session.get_inputs()[0]
        batch, _, *sides = (side if isinstance(side, int) else 2 for side in entry.shape)
        x = inputs.smooth(batch, *sides)[:, : entry.shape[1]]
        outputs.append(session.run(None, {entry.name: x})[0])
    before, after = outputs
    if before.shape != after.shape or not np.allclose(before, after, rtol=1e-3, atol=1e-4):
        raise UserError(
            f"opset: got other outputs after the conversion from {onnx_file.opset(source)} to {FOLDED_OPSET}; "
            "expected the same; export the network at opset 17 or later"
        )


def _without_weights_as_inputs(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy whose graph inputs are data only: IR 3 lists every weight as an input too."""
    copy = type(model)()
    copy.CopyFrom(model)
    weights = {w.name for w in copy.graph.initializer}
    inputs = [i for i in copy.graph.input if i.name not in weights]
    del copy.graph.input[:]
    copy.graph.input.extend(inputs)
    copy.ir_version = max(copy.ir_version, 8)
    return copy


def _constant_operands(model: onnx.ModelProto) -> list[str]:
    """Names of element-wise nodes that read a constant (GELU's `x * 0.5`), which TensorRT rejects in int8."""
    constants = {weight.name for weight in model.graph.initializer}
    kinds = ("Add", "Mul", "Sub", "Div")
    return [n.name for n in model.graph.node if n.op_type in kinds and constants & set(n.input)]


def quantizable() -> list[str]:
    """Operators to quantize: all that ONNX Runtime can, except Softmax and Pad."""
    from onnxruntime.quantization.registry import QDQRegistry, QLinearOpsRegistry

    # 8 bits cannot hold Softmax's probabilities over many classes. ONNX Runtime runs Pad in float all the
    # same, and TensorRT rejects a quantized padding value.
    return sorted({*QDQRegistry, *QLinearOpsRegistry} - {"Softmax", "Pad"})


def _calibration_reader(model: onnx.ModelProto, x: Array) -> Any:
    """ONNX Runtime's calibration reader over x (N, 3, S, S), in the model's own batch or 8 at a time."""
    from onnxruntime.quantization import CalibrationDataReader

    entry = model.graph.input[0]
    fixed = entry.type.tensor_type.shape.dim[0].dim_value
    batch = fixed or 8
    whole = len(x) // fixed * fixed if fixed else len(x)
    chunks = np.split(x[:whole], range(batch, whole, batch))

    class Reader(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.batches: Iterator[Array] = iter(chunks)

        def get_next(self) -> dict[str, Array] | None:
            chunk = next(self.batches, None)
            return None if chunk is None else {entry.name: chunk}

    return Reader()


def _with_metadata(
    converted: onnx.ModelProto, source: onnx.ModelProto, precision: str
) -> onnx.ModelProto:
    """`converted` with the metadata of its source and its own precision."""
    properties = {**onnx_file.read_metadata(source), "precision": precision}
    return onnx_file.add_metadata(converted, **properties)
