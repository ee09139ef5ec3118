"""The projector losses at 64 and 196 tokens in bfloat16 and float32: every provider, roofline, peak memory."""

from __future__ import annotations

import argparse
from functools import partial
from typing import Any

import torch

from benchmarks import kernels
from benchmarks.gpu_parts.part import COMMAND, Part, Row, parser
from benchmarks.shapes import Shape
from pipeline.core import cli

TOKENS = (64, 196)
DTYPES = ("bfloat16", "float32")
PARTS = ("host", "attention", "tokens")
DRY = (Shape(2, (8, 8), 2, 16, 16), Shape(1, (14, 14), 2, 16, 16))
RESULTS = [f"kernels-{dtype}" for dtype in DTYPES]


def shapes() -> tuple[Shape, ...]:
    """The first of the benchmark's shapes for each number of tokens."""
    every = kernels.selected_shapes(True, TOKENS, None)
    return tuple(next(shape for shape in every if shape.n == n) for n in TOKENS)


def main(args: argparse.Namespace) -> None:
    """Measure each dtype, written row group by row group."""
    device = torch.device("cpu" if args.dry else "cuda")
    for dtype, name in zip(DTYPES, RESULTS, strict=True):
        selected = DRY if args.dry else shapes()
        selection = kernels.Selection(
            PARTS, selected, (), getattr(torch, dtype), device, compiled=not args.dry
        )
        params = {"parts": PARTS, "shapes": [str(s) for s in selected], "dtype": dtype}
        save = partial(kernels.write, args.out / name, params, f"{COMMAND} --parts kernels")
        kernels.run(selection, save)


def rows(result: dict[str, Any]) -> list[Row]:
    """The fastest provider of each work beside the first, its baseline."""
    lines = []
    for title, providers in result["work"].items():
        measured = {name: row for name, row in providers.items() if "ms" in row}
        if not measured:
            lines.append((f"{title}, {result['dtype']}", "not measured: no provider ran"))
            continue
        base = next(iter(measured))
        best = min(measured, key=lambda name: measured[name]["ms"]["median"])
        summaries = [summary(name, measured[name]) for name in dict.fromkeys((best, base))]
        lines.append((f"{title}, {result['dtype']}", "; ".join(summaries)))
    return lines


def summary(name: str, row: dict[str, Any]) -> str:
    """The figures of one provider in one line."""
    text = f"{name} {row['ms']['median']:.3f} ms"
    if "roofline_percent" in row:
        text += f", {row['roofline_percent']:.0f} % of the roofline"
    if "peak_mb" in row:
        device = row.get("graph_ms", row["device_ms"])
        text += f", {row['peak_mb']:.0f} MB, device {device:.3f} ms"
    if "bound" in row:
        text += f", bound by {row['bound']}"
    return text


PART = Part(__name__, 3, RESULTS, rows)

if __name__ == "__main__":
    cli.run(main, parser("benchmarks.gpu kernels", __doc__))
