"""ONNX -> OpenVINO IR in fp32, fp16 or int8, each gated against the ONNX."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.artifact import agreement, inputs, onnx_file
from exporters.artifact.quiet import quiet
from exporters.artifact.session import Unavailable
from exporters.device.errors import one_line
from exporters.device.ov import shared_core
from exporters.ort import int8
from exporters.ort.session import OrtSession
from exporters.ov.session import METADATA_BRANCH, OvSession, openvino_library
from pipeline.core.atomic import make_parent
from pipeline.core.errors import UserError


def write_ir(source: Path, out: Path, half: bool = False, batch: int | None = None) -> None:
    """ONNX file -> `out` (.xml and .bin beside it), metadata in rt_info; `half` stores weights as fp16.

    `batch` fixes a dynamic one. Raises UserError: OpenVINO cannot read the file, another batch is fixed in it.
    """
    properties = onnx_file.read_metadata(onnx_file.read_onnx(source))
    _save(
        _read(source, batch), {**properties, **({"precision": "fp16"} if half else {})}, out, half
    )


def _read(source: Path, batch: int | None) -> Any:
    """Raises UserError: OpenVINO cannot read the file, or another batch is fixed in it."""
    core = shared_core(openvino_library())
    try:
        model = core.read_model(source)
        shape = model.inputs[0].partial_shape
    except Exception as error:  # openvino raises bare RuntimeErrors
        raise UserError(
            f"{source}: OpenVINO rejects it: {one_line(error)}; use python -m exporters.ort"
        ) from None
    if batch:
        if shape[0].is_static and shape[0].get_length() != batch:
            raise UserError(
                f"--batch: got {batch}, but {source} has a fixed batch of {shape[0]}; leave --batch out"
            )
        shape[0] = batch
        try:
            model.reshape(shape)
        except Exception as error:  # openvino raises bare RuntimeErrors
            raise UserError(
                f"--batch: got {batch}, with which OpenVINO rejects {source}: {one_line(error)}; leave --batch out"
            ) from None
    return model


def _save(model: Any, properties: Mapping[str, str], out: Path, half: bool = False) -> None:
    for key, value in properties.items():
        model.set_rt_info(value, [METADATA_BRANCH, key])
    make_parent(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        draft = Path(folder) / out.name
        openvino_library().save_model(model, draft, compress_to_fp16=half)
        replace_ir(draft, out)


def replace_ir(draft: Path, out: Path) -> None:
    """Move a finished IR, two files, to `out`: the weights first, so that an .xml never lacks its .bin."""
    draft.with_suffix(".bin").replace(out.with_suffix(".bin"))
    draft.replace(out)


def convert_to_ir(
    source: Path,
    out: Path,
    precision: str,
    images: int8.CalibrationImages | None,
    settings: int8.Settings,
    by: str = "qdq",
    batch: int | None = None,
    force: bool = False,
) -> dict[str, Any]:
    """fp32 ONNX -> IR at fp32, fp16 (weights) or int8 (from `images`); returns its parity row.

    int8 is our QDQ ONNX converted, or NNCF's where `by` is `nncf`; `batch` fixes a dynamic one.
    Raises GateFailed, and leaves `out` as it was, where the verdict is FAIL, or UNDECIDED without `force`.
    """
    openvino_library()
    reference = OrtSession(source, 1)
    x, labels = inputs.probe_images(reference, 2 * (batch or 5)), None
    make_parent(out)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.stem}.") as folder:
        draft = Path(folder) / out.name
        if precision == "int8":
            assert images is not None
            x, labels = images.held_out, images.labels
            quantize = _by_nncf if by == "nncf" else _by_qdq
            quantize(source, images, settings, draft, batch)
        else:
            write_ir(source, draft, precision == "fp16", batch)
        # The f32 hint: the row is about the conversion, not about the CPU's choice of precision.
        session = OvSession(draft, 1, "fp32")
        row = agreement.gated_row(out, (reference, session), x, labels, settings.max_drop, force)
        replace_ir(draft, out)
    return row


def _by_qdq(
    source: Path,
    images: int8.CalibrationImages,
    settings: int8.Settings,
    out: Path,
    batch: int | None,
) -> None:
    quantized = out.with_suffix(".onnx")
    onnx_file.write_onnx(
        int8.quantize_within_gates(source, images, settings, agreement.Thresholds()), quantized
    )
    write_ir(quantized, out, batch=batch)


def _by_nncf(
    source: Path, images: int8.CalibrationImages, _: int8.Settings, out: Path, batch: int | None
) -> None:
    """NNCF's post-training quantization, MIXED: symmetric weights, asymmetric activations.

    Raises Unavailable: NNCF is missing; UserError: it rejects the network.
    """
    network = _read(source, batch)
    entry = network.inputs[0].partial_shape[0]
    size = entry.get_length() if entry.is_static else 1
    count = len(images.calibration) // size
    batches = images.calibration[: count * size].reshape(-1, size, *images.calibration.shape[1:])
    try:
        with quiet():
            import nncf

            quantized = nncf.quantize(
                network,
                nncf.Dataset(list(batches)),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=count,
            )
    except ImportError as error:
        raise Unavailable(
            f"--int8-by nncf: NNCF is not installed ({error}); `pip install '.[nncf]'`, or leave the option out"
        ) from None
    except Exception as error:  # whatever its passes raise
        raise UserError(
            f"{source}: NNCF rejects it: {one_line(error)}; leave --int8-by out"
        ) from None
    properties = onnx_file.read_metadata(onnx_file.read_onnx(source))
    _save(quantized, {**properties, "precision": "int8", "int8": "by NNCF"}, out)
