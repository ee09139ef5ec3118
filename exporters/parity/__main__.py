"""Comparison of two artefacts on the same images: metrics, and a verdict by the coarser precision.

`python -m exporters.parity A B [--images DIR] [--layers] [--shape B,C,H,W]`: A is the reference; either may be
a checkpoint (.safetensors), .onnx, .xml or .plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from exporters.artifact import agreement, inputs
from exporters.artifact.input_shape import add_shape_option, fixed_input
from exporters.open import open_artefact
from exporters.parity import layers
from pipeline.core import cli
from pipeline.core.errors import GateFailed


def main(args: argparse.Namespace) -> None:
    """Compare two artefacts and print the metrics. Raises GateFailed: the verdict is not PASS."""
    with fixed_input(args.a, args.shape) as a, fixed_input(args.b, args.shape) as b:
        compare(args, a, b)


def compare(args: argparse.Namespace, first: Path, second: Path) -> None:
    """Compare artefacts of fixed input size and print the metrics. Raises GateFailed: the verdict is not PASS."""
    if args.layers:
        layers.compare_layers(first, second, args.images)
        return
    a, b = open_artefact(first, 1), open_artefact(second, 1)
    x = agreement.comparison_images(a, b, args.images)
    precision = agreement.coarsest_precision(a, b)
    metrics, verdict, reason = agreement.compare_outputs(
        inputs.run_batches(a, x), inputs.run_batches(b, x), precision, agreement.Thresholds()
    )
    for path, session in ((args.a, a), (args.b, b)):
        print(f"{path}: {session.runtime}, computes in {session.precision_effective}")
    source = args.images or "seeded smooth images"
    line = agreement.describe_row({**metrics, "verdict": verdict, "reason": reason})
    print(f"{len(x)} of {source}, gate of {precision}: {line}")
    if verdict == "FAIL":
        raise GateFailed(f"{args.b} does not compute what {args.a} computes: {reason}")
    if verdict == "UNDECIDED":
        raise GateFailed(f"{args.b} and {args.a}: parity is UNDECIDED: {reason}; give --images")


def parser() -> argparse.ArgumentParser:
    """The command line of `python -m exporters.parity`."""
    p = argparse.ArgumentParser(prog="exporters.parity", description=__doc__)
    p.add_argument("a", type=Path, help="the reference: .safetensors, .onnx, .xml or .plan")
    p.add_argument("b", type=Path, help="the artefact to compare with it")
    p.add_argument(
        "--images", type=Path, help="images to run: a folder of images or a prepared folder"
    )
    p.add_argument(
        "--layers", action="store_true", help="of two ONNX files: the node where they diverge"
    )
    add_shape_option(p)
    return p


if __name__ == "__main__":
    cli.run(main, parser())
