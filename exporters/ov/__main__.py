"""ONNX -> OpenVINO IR in fp32, fp16 or int8.

`python -m exporters.ov student.onnx [-o DIR] [--precision fp32,fp16,int8] [--calib DIR] [--cache DIR]
[--force] [--shape B,C,H,W]`
A precision that fails its gate is not written; one that parity cannot decide only with --force. fp16 is how the
weights are stored; the precision the CPU computes in is chosen when the IR is opened. Without a hint OpenVINO is
bfloat16 on CPUs that have it: twice as fast, and a different network by 2-6e-3.
"""

from __future__ import annotations

import argparse
import time
from functools import partial
from pathlib import Path

import numpy as np

from exporters.artifact import agreement
from exporters.artifact.input_shape import add_shape_option, fixed_input
from exporters.artifact.precision import (
    add_conversion_options,
    parse_precisions,
    precision_path,
    run_all,
)
from exporters.ort import int8
from exporters.ov import convert
from exporters.ov.session import OvSession
from pipeline.core import cli
from pipeline.core.errors import UserError

OPENINGS = 5  # pairs of loads, with the cache and without, whose median ratio is printed


def main(args: argparse.Namespace) -> None:
    """Write each precision and print one line a file; a failed gate is raised after the last."""
    precisions = parse_precisions(args.precision)
    if args.onnx.suffix != ".onnx":
        raise UserError(
            f"{args.onnx}: got suffix {args.onnx.suffix!r}; expected .onnx; export the model first"
        )
    with fixed_input(args.onnx, args.shape) as source:
        convert_all(args, source, precisions)


def convert_all(args: argparse.Namespace, source: Path, precisions: list[str]) -> None:
    """Convert an ONNX file of fixed input size to each precision."""
    out = (args.out or args.onnx.parent) / f"{args.onnx.stem}.xml"
    settings = int8.Settings(args.calibration, args.search_seconds)
    images = int8.calibration_images(source, args.calib) if "int8" in precisions else None

    def write(precision: str) -> None:
        target = precision_path(out, precision)
        make = partial(convert.convert_to_ir, source, target, precision, images, settings)
        agreement.print_result(target, partial(make, args.int8_by, args.batch, args.force))
        if args.cache:
            print(_fill_cache(target, args.cache))

    run_all(partial(write, precision) for precision in precisions)


def _fill_cache(ir: Path, cache: Path) -> str:
    """Compile the IR into the cache; returns a line with the load time with the cache over that without."""

    def cpu_seconds(folder: Path | None) -> float:
        start = time.process_time()
        OvSession(ir, 1, "fp32", folder)
        return time.process_time() - start

    cpu_seconds(cache)
    ratios = [cpu_seconds(cache) / cpu_seconds(None) for _ in range(OPENINGS)]
    return f"{ir}: compiled into {cache}; opens in {np.median(ratios):.2f} of the CPU time"


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.ov`."""
    p = argparse.ArgumentParser(prog="exporters.ov", description=__doc__)
    add = p.add_argument
    add("onnx", type=Path, help="any fp32 .onnx classifier")
    add("-o", "--out", type=Path, help="folder of the IR; default: the ONNX file's")
    add_conversion_options(p)
    add_shape_option(p)
    int8.add_options(p)
    add(
        "--int8-by", choices=("qdq", "nncf"), default="qdq", help="our QDQ graph (default), or NNCF"
    )
    add(
        "--batch",
        type=cli.count,
        metavar="N",
        help="fix a dynamic batch at N, which is faster for small models",
    )
    add(
        "--cache",
        type=Path,
        help="also compile each IR for one thread of this CPU into DIR",
        metavar="DIR",
    )
    return p


if __name__ == "__main__":
    cli.run(main, parser())
