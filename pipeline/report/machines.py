"""Figures of other machines: an edge report, a bench JSON or a bundle's, read back as one summary each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import artifacts
from pipeline.core.errors import UserError, nearest
from pipeline.report import bundled, raw, schema
from pipeline.report.summary import BENCH, SCHEMA, model_of, target
from pipeline.report.verdict import MODELS, judge


def read_machine(path: Path) -> dict[str, Any]:
    """One machine's figures: a summary of this stage, a bench JSON of `exporters.bench --json`, or of a bundle.

    Raises UserError: another schema, not as it says, a row about neither student nor teacher, a method that ships
    and is none of the models.
    """
    found = artifacts.read_json(path)
    schema.check(path, found, (SCHEMA, BENCH, bundled.SCHEMA))
    if found["schema"] == SCHEMA:
        check_shipped(path, found)
        return {"pairs": [], "comparisons": [], **found}
    found = (
        bundled.bench(found) if found["schema"] == bundled.SCHEMA else raw.with_samples(found, path)
    )
    compared = found.get("comparisons", [])
    if not compared:
        check_models(path, found["rows"])
    rows = [] if compared else found["rows"]
    summary: dict[str, Any] = {
        "schema": SCHEMA,
        "title": path.stem,
        "shipped": None,
        "noise": [],
        "models": {},
        "targets": [
            target(name, [row for row in rows if row["target"] == name], {}, [])
            for name in dict.fromkeys(row["target"] for row in rows)
        ],
        "training": {},
        "parity": [],
        "pairs": found.get("pairs", []),
        "comparisons": compared,
        "budgets": [],
    }
    machine = {key: found[key] for key in ("machine", "provenance")}
    return {**summary, "verdict": judge(summary), **machine}


def check_shipped(path: Path, summary: Mapping[str, Any]) -> None:
    """Raise UserError where the method that ships is none of the models, which no schema can say."""
    if summary["shipped"] not in summary["models"]:
        raise UserError(
            f"{path}: shipped is {summary['shipped']!r}, which models does not hold; "
            f"{nearest(summary['shipped'], summary['models'])}; write it again"
        )


def check_models(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise UserError where a row is about neither student nor teacher."""
    for row in rows:
        if model_of(row["model"]) not in MODELS:
            raise UserError(
                f"{path}: a row is about {row['model']!r}; a report knows student and teacher: name the "
                "files student*.onnx and teacher*.onnx and run the bench again"
            )
