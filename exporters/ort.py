"""Checkpoint -> ONNX, checked in ONNX Runtime; its fp16 and int8 versions.

`python -m exporters.ort CHECKPOINT student.onnx [--opset N] [--precision fp32,fp16,int8] [--calib DIR]`
CHECKPOINT may be an .onnx file, anyone's: it is checked, copied and converted without torch. A precision that
fails its gate is refused and not written.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from exporters import agreement, embed, inputs, int8, metadata, onnx_file, quantize
from exporters.ort_session import OrtSession, open_file
from exporters.quiet import quiet
from exporters.session import Array, Unavailable
from pipeline import cli, files
from pipeline.data import normalised
from pipeline.errors import GateFailed, UserError, nearest

if TYPE_CHECKING:
    import onnx
    from torch import nn

OPSET = 18  # the one PyTorch's exporter writes natively; others are converted from it
BATCHES = (1, 2, 7)  # what a free batch axis must take
PRECISIONS = ("fp32", "fp16", "int8")


@dataclass(frozen=True)
class Export:
    """`export:` which student ships, as which ONNX, and how many images travel with it for the checks."""

    method: str
    opset: int = OPSET
    reference_images: int = 128
    calibration_images: int = 256

    def __post_init__(self) -> None:
        for name, least in (("reference_images", 2), ("calibration_images", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed: {least} or more")


def export(checkpoint: Path, out: Path, opset: int = OPSET) -> dict[str, Any]:
    """Checkpoint -> ONNX at `out`, weights inside, batch free; returns the parity row of the check.

    Training-time branches (RepVGG) are merged first; the check is against the checkpoint as it was loaded.
    Raises UserError: torch cannot write that opset; GateFailed: ONNX Runtime computes something else.
    """
    try:
        from pipeline import models
    except ImportError as error:
        raise Unavailable(
            f"{checkpoint}: reading a checkpoint needs torch and timm: {error}"
        ) from None
    model, description = models.load(checkpoint)
    size = description["preprocess"]["image_size"]
    proto = onnx_file.annotate(_trace(model, size, opset), metadata.flatten(description))
    with files.atomic(out) as temporary:
        onnx_file.save(proto, temporary)
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
    found = agreement.row(out, session, reference, got, agreement.Gates())
    if found["verdict"] == "FAIL":
        raise GateFailed(f"{out}: not the checkpoint: {found['reason']}; nothing was written")
    return found


def beside(out: Path, precision: str) -> Path:
    """student.onnx -> student-int8.onnx; fp32 keeps the plain name."""
    return out if precision == "fp32" else out.with_stem(f"{out.stem}-{precision}")


def parse_precisions(text: str, allowed: tuple[str, ...] = PRECISIONS) -> list[str]:
    """`fp32,int8` -> the list. Raises UserError on an unknown one."""
    wanted = [p.strip() for p in text.split(",") if p.strip()]
    for precision in wanted:
        if precision not in allowed:
            raise UserError(f"--precision: got {precision!r}; {nearest(precision, allowed)}")
    if not wanted:
        raise UserError(f"--precision: got {text!r}; allowed: {', '.join(allowed)}")
    return wanted


def convert(
    source: Path, out: Path, precision: str, pictures: int8.Pictures | None, how: int8.Settings
) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out` at fp32 (a checked copy), fp16 or, by `pictures`, int8; returns its parity row.

    Raises GateFailed, and leaves `out` as it was, where the row's verdict is FAIL.
    """
    proto = onnx_file.read(source)
    reference = OrtSession(source, 1)
    x, labels = inputs.shown(reference), None
    if precision == "fp16":
        proto = quantize.to_fp16(proto)
    elif precision == "int8":
        assert pictures is not None
        proto = int8.quantized(source, pictures, how, agreement.Gates())
        x, labels = pictures.held, pictures.labels
    with files.atomic(out) as temporary:
        onnx_file.save(proto, temporary)
        made = OrtSession(temporary, 1)
        return agreement.passed(out, (reference, made), x, labels, how.drop)


def write_embedded(source: Path, out: Path) -> dict[str, Any]:
    """fp32 ONNX `source` -> `out`, which takes (B, S, S, 3) uint8 RGB; returns its parity row.

    Raises UserError: no preprocessing in the metadata. GateFailed: not the same logits; nothing is written.
    """
    proto = onnx_file.read(source)
    notes = metadata.preprocessing(onnx_file.notes(proto))
    if notes is None:
        raise UserError(
            f"--embed-preprocessing: {source} carries no mean and std in its metadata; export it from a checkpoint"
        )
    reference = OrtSession(source, 1)
    smooth = inputs.shown(reference).transpose(0, 2, 3, 1)
    pixels = np.clip(smooth * 48 + 128, 0, 255).astype(np.uint8)
    with files.atomic(out) as temporary:
        onnx_file.save(embed.embedded(proto, notes["mean"], notes["std"]), temporary)
        got: Array = open_file(temporary, 1).run(None, {embed.PIXELS: pixels})[0]
        expected = inputs.run(reference, normalised(pixels, notes))
        row = agreement.row(out, reference, expected, got, agreement.Gates())
        if row["verdict"] == "FAIL":
            raise GateFailed(
                f"{out}: not the network it was made from: {row['reason']}; not written"
            )
    return row


def main(args: argparse.Namespace) -> None:
    """Write each precision beside `out`, one line a file; a failed gate is told once all are written."""
    wanted = parse_precisions(args.precision)
    foreign = args.checkpoint.suffix == ".onnx"
    if args.out.suffix != ".onnx":
        raise UserError(f"{args.out}: suffix is {args.out.suffix!r}; the output is an .onnx file")
    if foreign and args.opset:
        raise UserError(f"--opset {args.opset}: {args.checkpoint} keeps its own; leave it out")
    if "int8" in wanted and args.calib is None:
        raise UserError(int8.NO_CALIBRATION)
    how = int8.Settings(args.calibration, args.search_seconds)
    failed = []
    with tempfile.TemporaryDirectory() as folder:
        source = args.checkpoint
        if not foreign:
            source = args.out if "fp32" in wanted else Path(folder) / args.out.name
            line = _timed(source, partial(export, args.checkpoint, source, args.opset or OPSET))
            if "fp32" in wanted:
                print(line)
                wanted.remove("fp32")
        pictures = int8.calibration_images(source, args.calib) if "int8" in wanted else None
        for precision in wanted:
            out = beside(args.out, precision)
            try:
                print(_timed(out, partial(convert, source, out, precision, pictures, how)))
            except GateFailed as error:
                failed.append(str(error))
        if args.embed_preprocessing:
            out = args.out.with_stem(f"{args.out.stem}-uint8")
            print(_timed(out, partial(write_embedded, source, out)))
    if failed:
        raise GateFailed("; ".join(failed))


def _timed(out: Path, make: Callable[[], dict[str, Any]]) -> str:
    """The line that tells `make()`'s row."""
    start = time.perf_counter()
    row = make()
    seconds = time.perf_counter() - start
    line = f"{out}: {out.stat().st_size / 1e6:.2f} MB in {seconds:.1f} s, computes in "
    made = f"{row['int8']}, " if "int8" in row else ""
    return f"{line}{row['precision_effective']}, {made}{agreement.describe(row)}"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.ort", description=__doc__)
    p.add_argument("checkpoint", type=Path, help="a .safetensors checkpoint, or an .onnx file")
    p.add_argument(
        "out", type=Path, help="the .onnx to write; others get -fp16, -int8 in front of it"
    )
    p.add_argument("--opset", type=int, help=f"of a checkpoint's ONNX, {OPSET} if not given")
    p.add_argument("--precision", default="fp32", help="of fp32,fp16,int8")
    int8.add_options(p)
    p.add_argument(
        "--embed-preprocessing",
        action="store_true",
        help="also write OUT-uint8.onnx: takes (B, S, S, 3) uint8 pixels and normalises them inside",
    )
    return p


if __name__ == "__main__":
    cli.run(main, parser())
