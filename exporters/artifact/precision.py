"""Precisions that exporters write, and the file name of each."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable
from pathlib import Path

from pipeline.core.errors import GateFailed, UserError, nearest

PRECISIONS = ("fp32", "fp16", "int8")


def precision_path(out: Path, precision: str) -> Path:
    """student.onnx -> student-int8.onnx; fp32 keeps the plain name."""
    return out if precision == "fp32" else out.with_stem(f"{out.stem}-{precision}")


def parse_precisions(text: str, allowed: tuple[str, ...] = PRECISIONS) -> list[str]:
    """`fp32,int8` -> [fp32, int8]. Raises UserError: an unknown precision, or none."""
    precisions = [p.strip() for p in text.split(",") if p.strip()]
    for precision in precisions:
        if precision not in allowed:
            raise UserError(f"--precision: got {precision!r}; {nearest(precision, allowed)}")
    if not precisions:
        raise UserError(f"--precision: got {text!r}; expected one or more of {', '.join(allowed)}")
    return precisions


def add_conversion_options(p: argparse.ArgumentParser) -> None:
    """Add the options that all conversions share: the precisions, and --force."""
    p.add_argument(
        "--precision", default="fp32", help="comma-separated list of fp32, fp16, int8; default fp32"
    )
    add_force(p)


def add_force(p: argparse.ArgumentParser) -> None:
    """Add --force, which writes what parity cannot decide; a FAIL stays one."""
    p.add_argument(
        "--force", action="store_true", help="also write a network whose parity is UNDECIDED"
    )


def run_all(steps: Iterable[Callable[[], None]]) -> None:
    """Run every step, whatever became of the others.

    Raises at the end, with all reasons: UserError where a step was refused, else GateFailed where a gate failed.
    """
    errors: list[UserError | GateFailed] = []
    for step in steps:
        try:
            step()
        except (UserError, GateFailed) as error:
            errors.append(error)
    if errors:
        refused = any(isinstance(error, UserError) for error in errors)
        raise (UserError if refused else GateFailed)("; ".join(map(str, errors)))
