"""Do two artefacts compute the same? The same images through both, figures, and a verdict by the coarser one.

`python -m exporters.parity A B [--images DIR] [--layers]`: A is the reference; either may be a checkpoint
(.safetensors), .onnx, .xml or .plan.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from exporters.artifact import inputs
from exporters.artifact.agreement import (
    Thresholds,
    coarsest_precision,
    comparison_images,
    describe_row,
    figures,
    judge,
)
from exporters.open import open_artefact
from exporters.parity import layers
from pipeline.core import cli
from pipeline.core.errors import GateFailed


def main(args: argparse.Namespace) -> None:
    """Compare two artefacts, print the figures, fail on FAIL."""
    if args.layers:
        layers.compare_layers(args.a, args.b, args.images)
        return
    a, b = open_artefact(args.a, 1), open_artefact(args.b, 1)
    x = comparison_images(a, b, args.images)
    reference, other = inputs.run_batches(a, x), inputs.run_batches(b, x)
    found = figures(reference, other)
    precision = coarsest_precision(a, b)
    verdict, reason = judge(found, float(np.abs(reference).max()), precision, Thresholds())
    for path, session in ((args.a, a), (args.b, b)):
        print(f"{path}: {session.runtime}, computes in {session.precision_effective}")
    source = args.images or "seeded smooth images"
    line = describe_row({**found, "verdict": verdict, "reason": reason})
    print(f"{len(x)} of {source}, gate of {precision}: {line}")
    if verdict == "FAIL":
        raise GateFailed(f"{args.b} is not {args.a}: {reason}")
    if verdict == "UNDECIDED":
        raise GateFailed(f"{args.b} and {args.a}: parity is UNDECIDED: {reason}; give --images")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    p = argparse.ArgumentParser(prog="exporters.parity", description=__doc__)
    p.add_argument("a", type=Path, help="the reference: .safetensors, .onnx, .xml or .plan")
    p.add_argument("b", type=Path, help="the artefact to judge")
    p.add_argument("--images", type=Path, help="a folder of images, or a prepared folder")
    p.add_argument("--layers", action="store_true", help="two ONNX files: where they part, by node")
    return p


if __name__ == "__main__":
    cli.run(main, parser())
