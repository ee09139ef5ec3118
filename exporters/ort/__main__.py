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
from functools import partial
from pathlib import Path
from typing import Any

from exporters.artifact import agreement
from exporters.artifact.precision import beside, parse_precisions
from exporters.ort import int8
from exporters.ort.export import OPSET, convert, export, write_embedded
from pipeline.core import cli
from pipeline.core.errors import GateFailed, UserError


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
