"""Plan, verify and describe a feature cache: `python -m pipeline.store plan | verify | info`."""

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
    *("mode", "layout", "dtype", "images", "views", "records"),
    *("bytes_per_view", "error", "fingerprint"),
)
UNITS = {
    "bytes_per_view": "bytes per view",
    "r12": "R12 of the teacher (largest over second raw logit)",
    "total_gb": "size (GB)",
    "free_gb": "free on this disk (GB)",
    "disk_write_mb_per_s": "disk, sequential synced write (MB/s)",
    "disk_read_mb_per_s": "disk, random read of records (MB/s)",
    "teacher_img_per_s": "teacher (img/s)",
    "replay_img_per_s": "replayed last block (img/s)",
    "needed_gb_per_s": "disk speed below which the teacher is faster (GB/s)",
    "hours_to_write": "time to write (hours)",
    "pays_after_epochs": "epochs until it pays off, over all students",
}


def main(args: argparse.Namespace) -> None:
    """Run one of the commands and print its result."""
    if args.command == "info":
        manifest = verifying.check_bytes(args.store)
        result = {key: manifest[key] for key in INFO} | {"shards": len(manifest["shards"])}
        if manifest.get("r12"):
            result["r12"] = manifest["r12"]
    elif args.command == "verify":
        prepared = Prepared.open(args.prepared)
        prepared.verify()
        errors = verifying.verify(args.store, prepared, args.teacher, args.n)
        result = {"records": args.n, "relative_error": errors}
    else:
        prepared = Prepared.open(args.prepared)
        cache = config.load(Cache, args.params)
        live = teacher.load(args.teacher)
        result = planning.plan(cache, prepared, live, args.store, args.seconds)
    if args.json:
        print(json.dumps(result, indent=1))
    else:
        Console().print(table(f"{args.command} {args.store}", result))


def table(title: str, result: dict[str, Any]) -> Table:
    """Format names with units on the left, values on the right; groups are indented below their name."""
    rows = Table("", "", title=title, title_justify="left", show_header=False)
    for name, value in result.items():
        rows.add_row(UNITS.get(name, name.replace("_", " ")), _format(value))
        if isinstance(value, dict):
            for key, inner in value.items():
                rows.add_row(f"  {key}", _format(inner, deep=True))
    return rows


def _format(value: Any, deep: bool = False) -> str:
    if isinstance(value, dict):
        return "  ".join(f"{k} {_format(v)}" for k, v in value.items()) if deep else ""
    if value is None:
        return "never: reading takes as long as the teacher"
    if isinstance(value, float):
        return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"
    return str(value)


def parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="pipeline.store", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("plan", "estimate size, writing time and pay-off of the cache that params.yaml describes"),
        ("verify", "check every byte, and n records against the running teacher"),
        ("info", "describe a cache, after checking every byte"),
    ):
        add = commands.add_parser(name, help=text).add_argument
        add("store", type=Path, nargs="?", default=Path("data/features"), help="the feature cache")
        add("--json", action="store_true", help="print JSON instead of a table")
        if name == "info":
            continue
        add("--prepared", type=Path, default=Path("data/prepared"))
        add("--teacher", type=Path, default=Path("artifacts/teacher/teacher.safetensors"))
        if name == "plan":
            add("--params", type=Path, default=Path("params.yaml"))
            add("--seconds", type=float, default=planning.SECONDS, help="per measurement")
        else:
            add("-n", type=int, default=64, help="records to compare with the teacher")
    return parser


if __name__ == "__main__":
    cli.run(main, parser())
