"""Earlier runs of one machine beside this one: top-1 and the p50 of every target, run by run. Torch-free."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.report.formats.edge import Edge
from pipeline.report.pareto import wilson
from pipeline.report.raw import without_raw
from pipeline.report.summary import SCHEMA
from pipeline.report.verdict import noisy

LAST = 20  # runs shown, this one included
NEUTRAL = {"edge", "index", "report"}  # file names that tell no run from another

Summary = Mapping[str, Any]


def read(paths: Iterable[Path]) -> list[tuple[str, dict[str, Any]]]:
    """(name, summary) of earlier runs: files, and every summary in and below folders; other schemas are passed.

    Raises UserError: no such path, a file that is no `cakd.edge/1` or not as its schema says, JSON in a folder
    that cannot be read.
    """
    summaries = []
    for path in paths:
        if path.is_dir():
            inside = {p: artifacts.read_json(p) for p in sorted(path.rglob("*.json"))}
            read = {p: s for p, s in inside.items() if s.get("schema") == SCHEMA}
        elif path.is_file():
            read = {path: artifacts.read_json(path, SCHEMA)}
        else:
            raise UserError(f"--history: {path}: no such file or folder; give earlier edge.json")
        for file, summary in read.items():
            summaries.append((_name(file), artifacts.check(summary, Edge, file, "write it again")))
    return summaries


def _name(path: Path) -> str:
    return path.absolute().parent.name if path.stem in NEUTRAL else path.stem


def beside(
    summary: Summary, earlier: Sequence[tuple[str, Summary]], last: int = LAST
) -> dict[str, Any] | None:
    """Return `runs`, oldest first and this one last, and `elsewhere`: how many other machines' runs were left out.

    Milliseconds of two machines say nothing about each other. None where no earlier run is of this machine.
    """
    this = without_raw(summary)
    own = [(n, s) for n, s in earlier if machine(s) == machine(summary) and without_raw(s) != this]
    if not own:
        return None
    runs = sorted((_run(name, s) for name, s in own), key=lambda run: run["time"] or "")
    return {
        "targets": [t["target"] for t in summary["targets"]],
        "runs": [*runs, _run("this run", summary)][-last:],
        "elsewhere": sum(machine(s) != machine(summary) for _, s in earlier),
    }


def machine(summary: Summary) -> tuple[Any, ...]:
    """What two runs must share for their milliseconds to stand in one picture."""
    machine = summary["machine"]
    gpu = (machine.get("gpu") or {}).get("name")
    return machine.get("cpu"), machine.get("board"), gpu, (machine.get("cores") or {}).get("usable")


def _run(name: str, summary: Summary) -> dict[str, Any]:
    """One run: its name or commit, when it was measured, top-1 of what it shipped, p50 by target in ms."""
    rows = {t["target"]: t["student"] for t in summary["targets"]}
    rows = {target: row for target, row in rows.items() if row["status"] == "measured"}
    times = [row["conditions"]["time"] for row in rows.values() if row.get("conditions")]
    shipped = summary["models"].get(summary["shipped"])
    clean = shipped and shipped["clean"]
    commit = summary["provenance"].get("commit")
    return {
        "name": str(commit)[:10] if commit else name,
        "time": max(times, default=None),
        "shipped": summary["shipped"],
        "top1": clean and clean["top1"],
        "top1_ci": clean and wilson(clean["top1"], clean["n"]),
        "p50_ms": {target: row["wall_ms"]["p50"] for target, row in rows.items()},
        "noisy": [target for target, row in rows.items() if noisy(row)],
    }
