"""select: every student on the val images -> selection.json, which says whose student is exported."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import artifacts, cli, config
from pipeline.core.machine import machine
from pipeline.data.prepared import Prepared
from pipeline.evaluate import selection


def main(args: argparse.Namespace) -> None:
    """Select among the students of `distill.methods` by `export.method`."""
    methods = config.value("distill.methods", args.params)
    asked = config.value("export.method", args.params)
    students = {m: args.students / m / "student.safetensors" for m in methods}
    found = selection.select(Prepared.open(args.prepared), students, asked)
    document = {"schema": selection.SCHEMA, **artifacts.rounded(found), "machine": machine()}
    artifacts.write_json(args.out, document)
    print(f"{args.out}: {found['selected']}, {found['reason']}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="stages.select", description=__doc__)
    parser.add_argument("prepared", type=Path, help="the prepared folder")
    parser.add_argument("students", type=Path, help="the folder of the students, one a method")
    parser.add_argument("out", type=Path, help="selection.json to write")
    parser.add_argument("--params", type=Path, default=Path("params.yaml"))
    cli.run(main, parser)
