"""Stage select: evaluate every student on val and write which one is exported."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import artifacts, cli, config
from pipeline.core.machine import machine
from pipeline.data.prepared import Prepared
from pipeline.evaluate import selection


def main(args: argparse.Namespace) -> None:
    """Select one of the students of `distill.methods` by `export.method`."""
    methods = config.value("distill.methods", args.params)
    requested = config.value("export.method", args.params)
    crop_pct = config.value("evaluate.crop_pct", args.params, default=1.0)
    students = {m: args.students / m / "student.safetensors" for m in methods}
    result = selection.select(Prepared.open(args.prepared), students, requested, crop_pct)
    document = {"schema": selection.SCHEMA, **artifacts.rounded(result), "machine": machine()}
    artifacts.write_json(args.out, document)
    print(f"{args.out}: {result['selected']}, {result['reason']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.select", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("students", type=Path, help="the folder of the students, one per method")
    parser.add_argument("out", type=Path, help="selection.json to write")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
