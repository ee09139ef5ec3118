"""The smallest JSON artefacts that our readers take, for tests about something else."""

from __future__ import annotations

from typing import Any

from pipeline.core import artifacts
from pipeline.core.machine import machine


def head() -> dict[str, Any]:
    """The machine and the provenance that every report file has."""
    return {"machine": machine(), "provenance": artifacts.provenance()}


def selection(method: str) -> dict[str, Any]:
    """A selection.json that selects `method`."""
    methods = {method: {"top1": 0.9, "nll": 0.3, "n": 100}}
    said = {"split": "val", "methods": methods, "selected": method, "reason": "the only one"}
    return {"schema": "cakd.selection/1", **said, **head()}


def built(artefact: str | None, reason: str | None) -> dict[str, Any]:
    """A model of build.json at fp32: its file, or the reason why it has none."""
    numbers = {"size_mb": 0.1, "seconds": 1.0} if artefact else {"size_mb": None, "seconds": None}
    status = {"status": "built" if artefact else "skipped", "reason": reason, "artefact": artefact}
    precision = {
        "precision_requested": "fp32",
        "precision_effective": "fp32" if artefact else None,
    }
    return {**status, **precision, **numbers}


def parity(artefact: str, verdict: str) -> dict[str, Any]:
    """A parity.json of one target with one row."""
    figures = ("max_abs", "rel_between_std", "sqnr_centered_db", "top1_agreement")
    row = {
        "artifact": artefact,
        "runtime": "onnxruntime 1.23.0",
        "precision_effective": "fp32",
        **dict.fromkeys(figures, 0.5),
        "verdict": verdict,
        "reason": None if verdict == "PASS" else "as the test says",
    }
    return {"schema": "cakd.parity/1", "target": "ort-fp32", "rows": [row], **head()}
