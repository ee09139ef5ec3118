"""`python -m pipeline.store plan | verify | info`: what a feature store costs, holds, and whether it is true."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipeline.core import cli, config
from pipeline.data.prepared import Prepared
from pipeline.models import teacher
from pipeline.store import planning, verifying
from pipeline.store.policy import Cache

INFO = (
    "mode",
    "layout",
    "dtype",
    "images",
    "views",
    "records",
    "bytes_per_view",
    "error",
    "fingerprint",
)
UNITS = {
    "bytes_per_view": "bytes a view",
    "r12": "R12 of the teacher (largest over second raw logit)",
    "total_gb": "size (GB)",
    "free_gb": "free on this disk (GB)",
    "disk_write_mb_per_s": "disk, writing in a row, synced (MB/s)",
    "disk_read_mb_per_s": "disk, reading records at random (MB/s)",
    "teacher_img_per_s": "teacher here (img/s)",
    "replay_img_per_s": "replayed block here (img/s)",
    "needed_gb_per_s": "a disk slower than this loses to the teacher (GB/s)",
    "hours_to_write": "time to write (hours)",
    "pays_after_epochs": "pays after epochs, over all students",
}


def main(args: argparse.Namespace) -> None:
    """Run one of the commands and show what it found."""
    if args.command == "info":
        manifest = verifying.check_bytes(args.store)
        found = {key: manifest[key] for key in INFO} | {"shards": len(manifest["shards"])}
        if manifest.get("r12"):
            found["r12"] = manifest["r12"]
    elif args.command == "verify":
        prepared = Prepared.open(args.prepared)
        prepared.verify()
        errors = verifying.verify(args.store, prepared, args.teacher, args.n)
        found = {"records": args.n, "relative_error": errors}
    else:
        prepared = Prepared.open(args.prepared)
        cache = config.load(Cache, args.params)
        live = teacher.load(args.teacher)
        found = planning.plan(cache, prepared, live, args.store, args.seconds)
    if args.json:
        print(json.dumps(found, indent=1))
    else:
        Console().print(table(f"{args.command} {args.store}", found))


def table(title: str, found: dict[str, Any]) -> Table:
    """Names with their units on the left, values on the right; groups indented below their name."""
    shown = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in found.items():
        shown.add_row(UNITS.get(name, name.replace("_", " ")), _shown(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                shown.add_row(f"  {key}", _shown(inner, deep=True))
    return shown


def _shown(value: Any, deep: bool = False) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_shown(v)}" for k, v in value.items()) if deep else ""
    if value is None:
        return "never: reading costs as much as the teacher"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    whole = argparse.ArgumentParser(prog="pipeline.store", description=__doc__)
    commands = whole.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "what a store of params.yaml's `cache:` costs here, and when it has paid"),
        ("verify", "every byte of store and images, and n records against the live teacher"),
        ("info", "what is in a store, after checking every byte"),
    ):
        command = commands.add_parser(name, help=text)
        command.add_argument("store", type=Path, nargs="?", default=Path("data/features"))
        command.add_argument("--json", action="store_true")
        if name == "info":
            continue
        command.add_argument("--prepared", type=Path, default=Path("data/prepared"))
        command.add_argument(
            "--teacher", type=Path, default=Path("artifacts/teacher/teacher.safetensors")
        )
        if name == "plan":
            command.add_argument("--params", type=Path, default=Path("params.yaml"))
            command.add_argument(
                "--seconds", type=float, default=planning.SECONDS, help="for each measurement"
            )
        else:
            command.add_argument(
                "-n", type=int, default=64, help="records to hold against the teacher"
            )
    return whole


if __name__ == "__main__":
    cli.run(main, parser())
