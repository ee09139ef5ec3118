"""Checkpoint -> ONNX, checked in ONNX Runtime; fp16 and int8 versions of any ONNX file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveInt
from pydantic.dataclasses import dataclass

from exporters.artifact import agreement, inputs, metadata, onnx_file
from exporters.artifact.quiet import quiet
from exporters.artifact.session import Unavailable
from exporters.device import ort
from exporters.ort import embed, int8, quantize
from exporters.ort.session import OrtSession, onnxruntime_library
from pipeline.core.atomic import atomic
from pipeline.core.config import STRICT
from pipeline.core.errors import UserError
from pipeline.core.students import BEST
from pipeline.data.prepared import normalised

if TYPE_CHECKING:
    import onnx
    from torch import nn

# PyTorch's exporter writes opset 18 natively; others are converted from it.
OPSET = 18
BATCHES = (1, 2, 7)  # checked after the export: a dynamic batch axis must take them all


@dataclass(frozen=True, config=STRICT)
class Export:
    """`export:` the exported student, its ONNX opset, and how many images go with it for the checks."""

    method: str = BEST
    # of several students: the best within the budgets, or a name of distill.students; `student`: distill.student
    student: str = BEST
    opset: PositiveInt = OPSET
    reference_images: int = Field(default=128, ge=2)
    calibration_images: PositiveInt = 256


def export(checkpoint: Path, out: Path, opset: int = OPSET, force: bool = False) -> dict[str, Any]:
    """Checkpoint -> ONNX at `out`, weights inside, batch free; returns the parity row of the check.

    Training-time branches (RepVGG) are merged first; the check is against the checkpoint as it was loaded.
    Raises UserError: torch cannot write that opset; GateFailed: ONNX Runtime computes something
    else, or parity is UNDECIDED without `force`.
    """
    try:
        from pipeline.models.checkpoint import load
    except ImportError as error:
        raise Unavailable(
            f"{checkpoint}: torch or timm is not installed ({error}); `pip install torch timm`"
        ) from None
    return export_model(*load(checkpoint), out, opset, force)


def export_model(
    model: nn.Module, description: dict[str, Any], out: Path, opset: int, force: bool = False
) -> dict[str, Any]:
    """Export a loaded checkpoint, as `export`. The model is not changed."""
    size = description["preprocess"]["image_size"]
    proto = onnx_file.replace_metadata(_trace(model, size, opset), metadata.flatten(description))
    with atomic(out) as temporary:
        onnx_file.write_onnx(proto, temporary)
        return _check(model, temporary, out, size, force)


def _trace(model: nn.Module, size: int, opset: int) -> onnx.ModelProto:
    import torch
    from timm.utils.model import reparameterize_model

    sample = torch.from_numpy(inputs.smooth(2, size, size))
    merged = reparameterize_model(model).eval()
    try:
        with quiet():
            program = torch.onnx.export(
                merged,
                (sample,),
                input_names=["image"],
                output_names=["logits"],
                dynamic_shapes=({0: torch.export.Dim("batch", min=1)},),
                opset_version=opset,
                dynamo=True,
                verbose=False,
            )
            assert program is not None
            proto: onnx.ModelProto = program.model_proto
    except Exception as error:  # torch wraps whatever its many passes raise
        reason = str(error.__cause__ or error).strip().split("\n")[0]
        raise UserError(
            f"opset: got {opset}, at which torch cannot export this network ({reason}); use opset {OPSET}"
        ) from error
    if (got := onnx_file.opset(proto)) != opset:
        raise UserError(
            f"opset: got {opset}, but torch wrote {got}; use opset {got} or another one"
        )
    return proto


def _check(model: nn.Module, written: Path, out: Path, size: int, force: bool) -> dict[str, Any]:
    """Compare batches of 1, 2 and 7 in ONNX Runtime with torch; returns the parity row."""
    import torch

    session = OrtSession(written, threads=1)
    x = np.split(inputs.smooth(sum(BATCHES), size, size), np.cumsum(BATCHES)[:-1])
    with torch.inference_mode():
        reference = model(torch.from_numpy(np.concatenate(x))).numpy()
    logits = np.concatenate([session.run(batch) for batch in x])
    row = agreement.parity_row(out, session, reference, logits, agreement.Thresholds())
    fail = "ONNX Runtime does not compute the checkpoint: "
    agreement.require_pass(out, row, force, fail, "try another export.opset")
    return row


def convert_onnx(
    source: Path,
    out: Path,
    precision: str,
    images: int8.CalibrationImages | None,
    settings: int8.Settings,
    force: bool = False,
) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out` at fp32 (a checked copy), fp16, int8 (from `images`) or with int8 weights.

    Returns its parity row.

    Raises GateFailed, and leaves `out` as it was, where the verdict is FAIL, or UNDECIDED without `force`.
    """
    proto = onnx_file.read_onnx(source)
    reference = OrtSession(source, 1)
    x, labels = inputs.probe_images(reference), None
    if precision == "fp16":
        proto = quantize.to_fp16(proto)
    elif precision == quantize.WEIGHTS:
        proto = quantize.with_int8_weights(proto)
    elif precision == "int8":
        assert images is not None
        proto = int8.quantize_within_gates(source, images, settings, agreement.Thresholds())
        x, labels = images.held_out, images.labels
    with atomic(out) as temporary:
        onnx_file.write_onnx(proto, temporary)
        converted = OrtSession(temporary, 1)
        return agreement.gated_row(out, (reference, converted), x, labels, settings.max_drop, force)


def write_embedded(source: Path, out: Path, force: bool = False) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out`, which takes (B, S, S, 3) uint8 RGB; returns the parity row of `out`.

    Raises UserError: no preprocessing in the metadata. GateFailed: not the same logits, or UNDECIDED
    without `force`; nothing is written.
    """
    proto = onnx_file.read_onnx(source)
    preprocess = metadata.preprocessing(onnx_file.read_metadata(proto))
    reference = OrtSession(source, 1)
    if preprocess is None or reference.input_shape[1] != 3:
        raise UserError(
            f"--embed-preprocessing: got {source} of {reference.input_shape[1]} channels with preprocessing "
            f"{preprocess}; expected RGB with mean and std in its metadata; export it from a checkpoint"
        )
    smooth = inputs.probe_images(reference).transpose(0, 2, 3, 1)
    pixels: Any = np.clip(smooth * 48 + 128, 0, 255).astype(np.uint8)
    with atomic(out) as temporary:
        onnx_file.write_onnx(
            embed.embed_normalisation(proto, preprocess["mean"], preprocess["std"]), temporary
        )
        logits = ort.OrtModel(onnxruntime_library(), temporary, 1).run(pixels)
        expected = inputs.run_batches(reference, normalised(pixels, preprocess))
        row = agreement.parity_row(out, reference, expected, logits, agreement.Thresholds())
        agreement.require_pass(out, row, force, f"does not compute what {source} computes: ")
    return row
