"""Stage device: describe this machine. Build and bench depend on it, so other hardware re-runs them."""

from __future__ import annotations

import argparse
from pathlib import Path

from pipeline.core import artifacts, cli
from pipeline.core.machine import machine

SCHEMA = "cakd.device/1"


def main(args: argparse.Namespace) -> None:
    """Write `args.out`: the same bytes on the same machine with the same packages."""
    block = machine()
    artifacts.write_json(
        args.out, {"schema": SCHEMA, "machine": block, "provenance": artifacts.provenance()}
    )
    gpu = block["gpu"]["name"] if block["gpu"] else "no GPU"
    print(
        f"{args.out}: {block['cpu']}, {block['cores']['usable']} of {block['cores']['logical']} cores, "
        f"{block['memory_gb']} GB, {gpu}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m stages.device", description=__doc__)
    parser.add_argument("out", type=Path, help="reports/device.json")
    cli.run(main, parser)
