"""The output of every benchmark: a JSON with machine and provenance, and its table as Markdown under a head."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from pipeline.core import artifacts
from pipeline.core import machine as core_machine
from pipeline.core.atomic import atomic

machine = cache(core_machine.machine)  # runs system tools, so once a process


def write(
    out: Path,
    schema: str,
    result: dict[str, Any],
    made_by: dict[str, Any],
    command: str,
    table: str,
) -> None:
    """Write `<out>.json` and `<out>.md`; the head names the machine, torch's version and the command."""
    artifacts.write_json(
        out.with_suffix(".json"),
        {"schema": schema, **result, "machine": machine(), "provenance": made_by},
    )
    head = f"{machine_line()}. Command: `{command}`"
    with atomic(out.with_suffix(".md")) as temporary:
        temporary.write_text(f"{head}\n\n{table}\n", encoding="utf-8")


def machine_line() -> str:
    """GPU, CPU, cores and torch's version, for the head of a table."""
    here = machine()
    name = f"{here['cpu']}, {here['cores']['usable']} cores"
    if here["gpu"]:
        name = f"{here['gpu']['name']}; {name}"
    return f"{name}, torch {here['versions']['torch']}"
