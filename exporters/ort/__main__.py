"""Checkpoint -> ONNX, checked in ONNX Runtime; its fp16 and int8 versions.

`python -m exporters.ort CHECKPOINT student.onnx [--opset N] [--precision fp32,fp16,int8] [--calib DIR]`
CHECKPOINT may be an .onnx file, anyone's: it is checked, copied and converted without torch. A precision that
fails its gate is refused and not written.
"""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path

from exporters.artifact import agreement
from exporters.artifact.precision import parse_precisions, precision_path, run_all
from exporters.ort import int8
from exporters.ort.export import OPSET, convert_onnx, export, write_embedded
from pipeline.core import cli
from pipeline.core.errors import UserError


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
    how = int8.Settings(args.calibration, args.search_seconds, force=args.force)
    with tempfile.TemporaryDirectory() as folder:
        source = args.checkpoint
        if not foreign:
            source = args.out if "fp32" in wanted else Path(folder) / args.out.name
            make = partial(export, args.checkpoint, source, args.opset or OPSET)
            if "fp32" in wanted:
                agreement.print_result(source, make)
                wanted.remove("fp32")
            else:
                make()
        pictures = int8.calibration_images(source, args.calib) if "int8" in wanted else None

        def write(precision: str) -> None:
            out = precision_path(args.out, precision)
            agreement.print_result(
                out, partial(convert_onnx, source, out, precision, pictures, how)
            )

        steps = [partial(write, precision) for precision in wanted]
        if args.embed_preprocessing:
            out = args.out.with_stem(f"{args.out.stem}-uint8")
            steps.append(partial(agreement.print_result, out, partial(write_embedded, source, out)))
        run_all(steps)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.ort", description=__doc__)
    add = p.add_argument
    add("checkpoint", type=Path, help="a .safetensors checkpoint, or an .onnx file")
    add("out", type=Path, help="the .onnx to write; others get -fp16, -int8 in front of it")
    add("--opset", type=int, help=f"of a checkpoint's ONNX, {OPSET} if not given")
    add("--precision", default="fp32", help="of fp32,fp16,int8")
    int8.add_options(p)
    add(
        "--embed-preprocessing",
        action="store_true",
        help="also write OUT-uint8.onnx: takes (B, S, S, 3) uint8 pixels and normalises them inside",
    )
    return p


if __name__ == "__main__":
    cli.run(main, parser())
