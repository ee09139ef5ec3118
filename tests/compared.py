"""Made-up files of the bench with pairs and comparisons (`cakd.bench/2`), and earlier runs."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from exporters.bench.latency import Ratio
from tests.test_report import HEAD, TARGETS, Run, bench


def ratio(median: float, tol: float | None = None) -> dict[str, Any]:
    """A ratio whose interval reaches three percent to either side."""
    found = {"median": median, "ci_low": 0.97 * median, "ci_high": 1.03 * median}
    if tol is None:
        return found
    return {**found, "tol": tol, "verdict": Ratio(**found, tol=tol).verdict}


def gate(name: str = "macs", verdict: str = "PASS", candidate: Any = 2_510_000) -> dict[str, Any]:
    """One gate free of noise."""
    found = {"name": name, "baseline": 2_510_000, "candidate": candidate, "limit": 2_510_000}
    return {**found, "verdict": verdict}


def comparison(
    target: str = "ort-fp32", verdict: str = "PASS", median: float = 1.0, **changed: Any
) -> dict[str, Any]:
    """The student against its baseline in one target."""
    found = {"model": "student.onnx", "target": target, "threads": 1, "verdict": verdict}
    found |= {"ratio": ratio(median, 0.1), "gates": [gate()], "rounds": 8, "processes": 3}
    found["reason"] = None
    return {**found, "process_spread": {"candidate": 0.01, "baseline": 0.02}, **changed}


def against(folder: Path, *comparisons: dict[str, Any]) -> Path:
    """A comparison file as `exporters.bench --against --json` writes it."""
    rows = bench("ort-fp32")["rows"][:2]
    rows[0]["model"], rows[1]["model"] = "student.onnx", "main.onnx"
    found = {"schema": "cakd.bench/2", "target": "ort-fp32", "rows": rows, "verdict": "PASS"}
    path = folder / "against.json"
    path.write_text(json.dumps({**found, "comparisons": list(comparisons), **HEAD}))
    return path


def with_pairs(run: Run) -> None:
    """Give the run's bench files pairs, and their rows intervals and counts."""
    for target in TARGETS:
        found = run.read(f"bench/{target}.json")
        for row in found["rows"]:
            p50 = row["wall_ms"]["p50"]
            row["wall_ms"]["p50_ci"] = p50 and [0.9 * p50, 1.2 * p50]
            row |= {"params": 1_520_906, "macs": 56_500_000, "engine_ms": None}
        pair = {
            "target": target,
            "threads": 1,
            "batch": 1,
            "candidate": "student",
            "baseline": "teacher",
        }
        if found["rows"][1]["status"] == "measured":
            found["pairs"] = [{**pair, "clock": "cpu", "ratio": ratio(0.2)}]
        run.write(f"bench/{target}.json", found)


def moment(time: str) -> dict[str, Any]:
    """The conditions of a row that was measured then."""
    unknown = ("load_1m", "governor", "cpu_mhz", "gpu_mhz", "throttled")
    return {"time": time, "kernel": "6.1.0", **dict.fromkeys(unknown)}


def past(edge: dict[str, Any], runs: int = 3, **machine: Any) -> list[tuple[str, dict[str, Any]]]:
    """Earlier runs like this one, a day apart from 1 November on, each slower than the one before."""
    found = []
    for day in range(1, runs + 1):
        earlier = copy.deepcopy(edge)
        earlier["machine"] = {**earlier["machine"], **machine}
        for target in earlier["targets"]:
            if target["student"]["status"] == "measured":
                target["student"]["wall_ms"]["p50"] *= 1 + 0.1 * day
                target["student"]["conditions"] = moment(f"2026-11-{day:02}T10:00:00+00:00")
        found.append((f"run-{day}", earlier))
    return found
