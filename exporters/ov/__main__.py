"""ONNX -> OpenVINO IR, and OpenVINO as a session whose precision is asked for and read back.

`python -m exporters.ov student.onnx [-o DIR] [--precision fp32,fp16,int8] [--calib DIR] [--cache DIR]`
A precision that fails its gate is refused and not written. fp16 is how the weights are stored; what the CPU
computes in is chosen when the IR is opened. Without a hint OpenVINO takes bfloat16 on CPUs that have it: twice as
fast, and a different network by 2-6e-3.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np

from exporters.artifact import agreement
from exporters.artifact.precision import parse_precisions, precision_path, run_all
from exporters.ort import int8
from exporters.ov import convert
from exporters.ov.session import OvSession
from pipeline.core import cli
from pipeline.core.errors import UserError

OPENINGS = 5  # pairs, to tell what a cache of compiled models gains


def main(args: argparse.Namespace) -> None:
    """Write each precision, one line a file; a failed gate is told once all are written."""
    wanted = parse_precisions(args.precision)
    if args.onnx.suffix != ".onnx":
        raise UserError(f"{args.onnx}: suffix is {args.onnx.suffix!r}; the input is an .onnx file")
    out = (args.out or args.onnx.parent) / f"{args.onnx.stem}.xml"
    how = int8.Settings(args.calibration, args.search_seconds, force=args.force)
    pictures = int8.calibration_images(args.onnx, args.calib) if "int8" in wanted else None

    def write(precision: str) -> None:
        target = precision_path(out, precision)
        make = partial(convert.convert_to_ir, args.onnx, target, precision, pictures, how)
        agreement.print_result(target, partial(make, args.int8_by, args.batch))
        if args.cache:
            print(_kept(target, args.cache))

    run_all(partial(write, precision) for precision in wanted)


def _kept(ir: Path, cache: Path) -> str:
    """Fill the cache with the IR, and tell what opening it costs with it and without."""

    def cpu_seconds(folder: Path | None) -> float:
        start = time.process_time()
        OvSession(ir, 1, "fp32", folder)
        return time.process_time() - start

    cpu_seconds(cache)
    ratios = [cpu_seconds(cache) / cpu_seconds(None) for _ in range(OPENINGS)]
    return f"{ir}: compiled into {cache}; opens in {np.median(ratios):.2f} of the CPU time"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.ov", description=__doc__)
    add = p.add_argument
    add("onnx", type=Path, help="an fp32 .onnx file, ours or anyone's")
    add("-o", "--out", type=Path, help="folder of the IR; beside the ONNX if not given")
    add("--precision", default="fp32", help="of fp32,fp16,int8")
    int8.add_options(p)
    add("--int8-by", choices=("qdq", "nncf"), default="qdq", help="our QDQ graph, or NNCF")
    add(
        "--batch",
        type=cli.count,
        metavar="N",
        help="fix a free batch: faster where a call is short",
    )
    add("--cache", type=Path, help="also compile each IR for one thread of this CPU, kept in here")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
