"""What every benchmark leaves: a JSON with machine and provenance, and its table as Markdown under a head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline import device, files


def write(
    out: Path, schema: str, found: dict[str, Any], made_by: dict[str, Any], command: str, shown: str
) -> None:
    """`<out>.json` and `<out>.md`; the head names the machine, torch's version and the command."""
    machine = device.machine()
    files.write_json(
        out.with_suffix(".json"),
        {"schema": schema, **found, "machine": machine, "provenance": made_by},
    )
    name = f"{machine['cpu']}, {machine['cores']['usable']} cores"
    if machine["gpu"]:
        name = f"{machine['gpu']['name']}; {name}"
    head = f"{name}, torch {machine['versions']['torch']}. Command: `{command}`"
    with files.atomic(out.with_suffix(".md")) as temporary:
        temporary.write_text(f"{head}\n\n{shown}\n", encoding="utf-8")
