"""A whole training step of plain, logits, cakd and cakd+logits, teacher cached: images a second and its stages.

With the loader (views made on the CPU) and with resident batches (views on the device already): the difference is
the cost of the loader. Trans and reading the store are part of both.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import training
from benchmarks.gpu_parts.part import Part, Row, parser
from pipeline.core import cli, machine

METHODS = "--methods plain logits cakd cakd+logits"
SETTINGS = {  # result -> the options of benchmarks.training
    "steps-32px": "--teacher vit_tiny_patch16_224 --patch 4 --student resnet18 --stride 8 --size 32 "
    "--batch 256 --images 1024 --steps 24 --precision bf16 --channels-last",
    "steps-224px": "--teacher vit_base_patch16_224 --patch 16 --student resnet50 --stride 32 --size 224 "
    "--batch 64 --images 256 --steps 12 --precision bf16 --channels-last",
}
DRY = {
    "steps-32px": "--teacher test_vit --patch 8 --student test_resnet --stride 8 --size 32 "
    "--batch 8 --images 24 --steps 3"
}
MAX_WORKERS = 8


def main(args: argparse.Namespace) -> None:
    """Measure each setting, written as it ends."""
    workers = 0 if args.dry else min(MAX_WORKERS, machine.usable_cores())
    for name, options in (DRY if args.dry else SETTINGS).items():
        line = f"{METHODS} {options} --workers {workers} --resident --out".split()
        training.main(training.parser().parse_args([*line, str(args.out / name)]))


def rows(result: dict[str, Any]) -> list[Row]:
    """Images a second of each method with each feed, and the stages of the loader's step."""
    params = result["provenance"]["params"]
    title = (
        f"step {params['student']} {params['size']} px B {params['batch']} {params['precision']}"
    )
    lines = []
    for method, row in result["methods"].items():
        rates = f"{row['wall_img_per_s']:.0f} img/s with the loader"
        if "resident" in result:
            resident = result["resident"][method]["wall_img_per_s"]
            rates += f", {resident:.0f} with resident batches"
        stages = ", ".join(f"{k} {v:.1f}" for k, v in row["stage_ms"].items() if v >= 0.05)
        lines.append((f"{title}, {method}", f"{rates}; ms: {stages}"))
    return lines


PART = Part(__name__, 2, list(SETTINGS), rows)

if __name__ == "__main__":
    cli.run(main, parser("benchmarks.gpu steps", __doc__))
