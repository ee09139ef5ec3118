"""Figures of other machines: an edge report, a bench JSON or a bundle's, read back as one summary each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from pipeline.core import artifacts, config
from pipeline.core.errors import UserError
from pipeline.core.validation import Format, schema_name
from pipeline.report import bundled, raw
from pipeline.report.formats.bench import Bench, BundleBench
from pipeline.report.formats.edge import Edge
from pipeline.report.summary import SCHEMA, model_of, target
from pipeline.report.verdict import MODELS, judge

KINDS: dict[str, type[Format]] = {schema_name(kind): kind for kind in (Edge, Bench, BundleBench)}
REMEDY = "write it again"


def read_machine(path: Path) -> dict[str, Any]:
    """One machine's figures: a summary of this stage, a bench JSON of `exporters.bench --json`, or of a bundle.

    Raises UserError: another schema, a value that its schema refuses, a row about neither student nor teacher.
    """
    document = artifacts.read_json(path)
    kind = KINDS.get(str(document.get("schema")))
    if kind is None:
        got = config.shorten(repr(document.get("schema")))
        raise UserError(f"{path}: schema: got {got}; expected one of {', '.join(KINDS)}")
    artifacts.check(document, kind, path, REMEDY)
    if kind is Edge:
        return {"pairs": [], "comparisons": [], **document}
    of_bundle = kind is BundleBench
    measured = bundled.bench(document) if of_bundle else raw.with_samples(document, path)
    compared = measured.get("comparisons", [])
    if not compared:
        check_models(path, measured["rows"])
    rows = [] if compared else measured["rows"]
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
        "pairs": measured.get("pairs", []),
        "comparisons": compared,
        "budgets": [],
    }
    machine = {key: measured[key] for key in ("machine", "provenance")}
    return {**summary, "verdict": judge(summary), **machine}


def check_models(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Raise UserError where a row is about neither student nor teacher, or two are about the same."""
    names: dict[tuple[str, str, int, int], str] = {}
    for row in rows:
        if model_of(row["model"]) not in MODELS:
            raise UserError(
                f"{path}: a row is about {row['model']!r}; a report knows student and teacher: name the "
                "files student*.onnx and teacher*.onnx and run the bench again"
            )
        subject = (model_of(row["model"]), row["target"], row["threads"], row["batch"])
        if (first := names.setdefault(subject, row["model"])) != row["model"]:
            raise UserError(
                f"{path}: rows are about {first!r} and {row['model']!r}, each the {subject[0]} in "
                f"{row['target']}; expected one; bench them into a JSON each"
            )
