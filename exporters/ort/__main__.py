"""Checkpoint -> ONNX, checked in ONNX Runtime; its fp16 and int8 versions.

`python -m exporters.ort CHECKPOINT student.onnx [--opset N] [--precision fp32,fp16,int8,int8-weights]
[--calib DIR] [--force] [--shape B,C,H,W]`
CHECKPOINT may be any .onnx file: it is checked, copied and converted without torch. A precision that fails its
gate is not written; one that parity cannot decide only with --force.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from exporters.artifact import agreement, onnx_file
from exporters.artifact.input_shape import add_shape_option, fixed_input
from exporters.artifact.precision import (
    PRECISIONS,
    add_conversion_options,
    parse_precisions,
    precision_path,
    run_all,
)
from exporters.ort import int8, quantize
from exporters.ort.export import OPSET, convert_onnx, export, write_embedded
from pipeline.core import cli
from pipeline.core.errors import UserError


def main(args: argparse.Namespace) -> None:
    """Write each precision beside `out` and print one line a file; a failed gate is raised after the last."""
    precisions = parse_precisions(args.precision, (*PRECISIONS, quantize.WEIGHTS))
    is_onnx = args.checkpoint.suffix == ".onnx"
    if args.out.suffix != ".onnx":
        raise UserError(
            f"{args.out}: got suffix {args.out.suffix!r}; expected .onnx; rename the output"
        )
    if is_onnx and args.opset:
        raise UserError(
            f"--opset: got {args.opset}, but {args.checkpoint} is ONNX and keeps its own opset; "
            "leave --opset out"
        )
    if args.shape and not is_onnx:
        raise UserError(
            f"--shape: got {args.checkpoint}, a checkpoint, which has its own image size; "
            "expected an .onnx file; leave --shape out"
        )
    if "int8" in precisions and args.calib is None:
        raise UserError(int8.NO_CALIBRATION)
    with fixed_input(args.checkpoint, args.shape) as checkpoint:
        convert_all(args, checkpoint, precisions)


def convert_all(args: argparse.Namespace, checkpoint: Path, precisions: list[str]) -> None:
    """Write each precision of a checkpoint, or of an ONNX file of fixed input size."""
    is_onnx = checkpoint.suffix == ".onnx"
    settings = int8.Settings(args.calibration, args.search_seconds)
    with onnx_file.working_copy(args.out) as draft:
        source = checkpoint
        if not is_onnx:
            source = args.out if "fp32" in precisions else draft
            make = partial(export, checkpoint, source, args.opset or OPSET, args.force)
            if "fp32" in precisions:
                agreement.print_result(source, make)
                precisions.remove("fp32")
            else:
                make()
        images = int8.calibration_images(source, args.calib) if "int8" in precisions else None

        def write(precision: str) -> None:
            out = precision_path(args.out, precision)
            agreement.print_result(
                out, partial(convert_onnx, source, out, precision, images, settings, args.force)
            )

        steps = [partial(write, precision) for precision in precisions]
        if args.embed_preprocessing:
            out = args.out.with_stem(f"{args.out.stem}-uint8")
            steps.append(
                partial(
                    agreement.print_result, out, partial(write_embedded, source, out, args.force)
                )
            )
        run_all(steps)


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.ort`."""
    p = argparse.ArgumentParser(prog="exporters.ort", description=__doc__)
    add = p.add_argument
    add("checkpoint", type=Path, help="a .safetensors checkpoint or an .onnx file")
    add(
        "out",
        type=Path,
        help="the .onnx file to write; fp16 and int8 get -fp16, -int8 before the suffix",
    )
    add("--opset", type=int, help=f"ONNX opset to export a checkpoint with, default {OPSET}")
    add_conversion_options(p)
    add_shape_option(p)
    int8.add_options(p)
    add(
        "--embed-preprocessing",
        action="store_true",
        help="also write OUT-uint8.onnx, which takes (B, S, S, 3) uint8 pixels and normalises them",
    )
    return p


if __name__ == "__main__":
    cli.run(main, parser())
