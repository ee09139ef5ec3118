"""Command line and description of the parts of the GPU benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Row = tuple[str, str]  # what was measured, and its figure
COMMAND = "python -m benchmarks.gpu"


def no_obstacle(_: argparse.Namespace) -> str | None:
    """The obstacle of a part that can always run: None."""
    return None


@dataclass(frozen=True)
class Part:
    """One part: its module, its share of the time, its results, and the rows it has in the summary."""

    module: str  # run with `python -m`
    weight: float  # share of the time left, against the parts after it
    results: Sequence[str]  # JSON files below --out, without suffix
    rows: Callable[[dict[str, Any]], list[Row]]  # of one of the results
    obstacle: Callable[[argparse.Namespace], str | None] = no_obstacle  # why it cannot run here


def parser(prog: str, description: str | None) -> argparse.ArgumentParser:
    """The command line of a part."""
    made = argparse.ArgumentParser(prog=prog, description=description)
    add = made.add_argument
    add("out", type=Path, help="folder of the results")
    add("--work", type=Path, required=True, help="folder of what the parts leave to each other")
    add("--seconds", type=float, required=True, help="time after which the part is stopped")
    add("--data", help="CIFAR-100: a prepared folder, parquet files or the archive")
    add("--dry", action="store_true", help="small, on the CPU")
    return made


def cell(text: str) -> str:
    """Escape a text for a cell of a Markdown table."""
    return " ".join(text.replace("|", "/").split())
