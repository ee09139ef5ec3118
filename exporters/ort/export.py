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
from pipeline.core.errors import GateFailed, UserError
from pipeline.data.prepared import normalised

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET = 18  # the one PyTorch's exporter writes natively; others are converted from it
BATCHES = (1, 2, 7)  # what a free batch axis must take
BEST = "best"  # of `method`: whichever has the best top-1 on val (stages/select.py)


@dataclass(frozen=True, config=STRICT)
class Export:
    """`export:` which student ships, as which ONNX, and how many images travel with it for the checks."""

    method: str = BEST
    opset: PositiveInt = OPSET
    reference_images: int = Field(default=128, ge=2)
    calibration_images: PositiveInt = 256


def export(checkpoint: Path, out: Path, opset: int = OPSET) -> dict[str, Any]:
    """Checkpoint -> ONNX at `out`, weights inside, batch free; returns the parity row of the check.

    Training-time branches (RepVGG) are merged first; the check is against the checkpoint as it was loaded.
    Raises UserError: torch cannot write that opset; GateFailed: ONNX Runtime computes something else.
    """
    try:
        from pipeline.models.checkpoint import load
    except ImportError as error:
        raise Unavailable(
            f"{checkpoint}: reading a checkpoint needs torch and timm: {error}"
        ) from None
    return export_model(*load(checkpoint), out, opset)


def export_model(
    model: nn.Module, description: dict[str, Any], out: Path, opset: int
) -> dict[str, Any]:
    """A loaded checkpoint -> ONNX; as `export`. The model stays as it is."""
    size = description["preprocess"]["image_size"]
    proto = onnx_file.replace_metadata(_trace(model, size, opset), metadata.flatten(description))
    with atomic(out) as temporary:
        onnx_file.write_onnx(proto, temporary)
        return _check(model, temporary, out, size)


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
            f"torch cannot export this network at opset {opset}: {reason}; try {OPSET}"
        ) from error
    if (got := onnx_file.opset(proto)) != opset:
        raise UserError(
            f"opset: asked for {opset}, torch wrote {got}; ask for {got} or for another one"
        )
    return proto


def _check(model: nn.Module, written: Path, out: Path, size: int) -> dict[str, Any]:
    """Run batches of 1, 2 and 7 in ONNX Runtime against torch."""
    import torch

    session = OrtSession(written, threads=1)
    x = np.split(inputs.smooth(sum(BATCHES), size, size), np.cumsum(BATCHES)[:-1])
    with torch.inference_mode():
        reference = model(torch.from_numpy(np.concatenate(x))).numpy()
    got = np.concatenate([session.run(part) for part in x])
    found = agreement.parity_row(out, session, reference, got, agreement.Thresholds())
    if found["verdict"] == "FAIL":
        raise GateFailed(f"{out}: not the checkpoint: {found['reason']}; nothing was written")
    return found


def convert_onnx(
    source: Path,
    out: Path,
    precision: str,
    pictures: int8.CalibrationImages | None,
    how: int8.Settings,
) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out` at fp32 (a checked copy), fp16 or, by `pictures`, int8; returns its parity row.

    Raises GateFailed, and leaves `out` as it was, where the row's verdict is FAIL.
    """
    proto = onnx_file.read_onnx(source)
    reference = OrtSession(source, 1)
    x, labels = inputs.probe_images(reference), None
    if precision == "fp16":
        proto = quantize.to_fp16(proto)
    elif precision == "int8":
        assert pictures is not None
        proto = int8.quantize_within_gates(source, pictures, how, agreement.Thresholds())
        x, labels = pictures.held, pictures.labels
    with atomic(out) as temporary:
        onnx_file.write_onnx(proto, temporary)
        made = OrtSession(temporary, 1)
        return agreement.gated_row(out, (reference, made), x, labels, how.drop, how.force)


def write_embedded(source: Path, out: Path) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out`, which takes (B, S, S, 3) uint8 RGB; returns its parity row.

    Raises UserError: no preprocessing in the metadata. GateFailed: not the same logits; nothing is written.
    """
    proto = onnx_file.read_onnx(source)
    notes = metadata.preprocessing(onnx_file.read_metadata(proto))
    if notes is None:
        raise UserError(
            f"--embed-preprocessing: {source} carries no mean and std in its metadata; export it from a checkpoint"
        )
    reference = OrtSession(source, 1)
    smooth = inputs.probe_images(reference).transpose(0, 2, 3, 1)
    pixels: Any = np.clip(smooth * 48 + 128, 0, 255).astype(np.uint8)
    with atomic(out) as temporary:
        onnx_file.write_onnx(
            embed.embed_normalisation(proto, notes["mean"], notes["std"]), temporary
        )
        got = ort.OrtModel(onnxruntime_library(), temporary, 1).run(pixels)
        expected = inputs.run_batches(reference, normalised(pixels, notes))
        row = agreement.parity_row(out, reference, expected, got, agreement.Thresholds())
        if row["verdict"] == "FAIL":
            raise GateFailed(
                f"{out}: not the network it was made from: {row['reason']}; not written"
            )
    return row
