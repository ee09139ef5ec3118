"""Builds of one target from the exported models, each compared with torch's own logits.

A lower precision that fails its gate is replaced by fp32, and the entry's reason says so.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from exporters.artifact import agreement, counts, inputs
from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build as Build
from exporters.artifact.session import Target, Unavailable
from exporters.device.compiled_cache import sidecar_path
from exporters.open import RUNTIMES, open_session


def build_model(
    target: Target, model: str, exported: Exported, out: Path, settings: Build
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Build one model into `out` -> (its entry of build.json, its rows of parity.json)."""
    if target.precision == "int8" and model == "teacher":
        reason = "int8 is built for the student only; the teacher is not deployed"
        return _skipped(target, model, reason)
    start, runtime = time.perf_counter(), RUNTIMES[target.runtime]
    try:
        artefact = runtime.make(target.precision, model, exported, out, settings)
        row = artefact_parity(target, target.precision, artefact, model, exported, settings)
    except Unavailable as error:
        return _skipped(target, model, str(error))
    rows, reason = [row], row["reason"]
    lossy = target.precision == "int8" or row["precision_effective"] != "fp32"
    if agreement.rejection(row) and lossy:
        row["verdict"] = "REJECTED"
        _remove(artefact)
        if target.precision == "default":
            reason = f"{row['precision_effective']}: {reason}; {target.name} offers nothing else"
            return _skipped(target, model, reason, rows)
        artefact = runtime.make("fp32", model, exported, out, settings)
        rows.insert(0, artefact_parity(target, "fp32", artefact, model, exported, settings))
        reason = f"fell back to fp32: {reason}"
    entry = {
        "status": "built",
        "reason": reason,
        "artefact": artefact.name,
        "precision_requested": target.precision,
        "precision_effective": rows[0]["precision_effective"],
        "size_mb": sum(p.stat().st_size for p in counts.artefact_files(artefact)) / 1e6,
        "seconds": time.perf_counter() - start,
    }
    return entry, rows


def artefact_parity(
    target: Target, precision: str, artefact: Path, model: str, exported: Exported, settings: Build
) -> dict[str, Any]:
    """The artefact's parity row against torch's logits; for int8 with the loss of top-1.

    precision: the one it was built in. An engine that cannot run here gets a skipped row.
    """
    try:
        session = open_session(target, artefact, 1)
    except Unavailable as error:
        if not RUNTIMES[target.runtime].needs_gpu:
            raise
        return agreement.skipped_row(artefact.name, precision, str(error))
    reference = exported.logits[model]
    logits = inputs.run_batches(session, exported.x[model])
    gates = agreement.fair_thresholds(session, settings)
    row = agreement.parity_row(artefact, session, reference, logits, gates)
    if precision == "int8":
        before = reference if exported.distilled is None else exported.distilled
        row = agreement.add_accuracy(row, before, logits, exported.labels, settings.int8_drop)
    return row


def _skipped(
    target: Target, model: str, reason: str, rows: list[dict[str, Any]] | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The build.json entry and the parity rows of a model that is not built for this target."""
    keys = ("artefact", "precision_requested", "precision_effective", "size_mb", "seconds")
    entry: dict[str, Any] = {"status": "skipped", "reason": reason, **dict.fromkeys(keys)}
    entry["precision_requested"] = target.precision
    artefact = target.artefact.format(model=model)
    return entry, rows or [agreement.skipped_row(artefact, target.precision, reason)]


def _remove(artefact: Path) -> None:
    for path in (*counts.artefact_files(artefact), sidecar_path(artefact)):
        path.unlink(missing_ok=True)


def failures(rows: list[dict[str, Any]]) -> str:
    """The failed rows with their reasons, in one line; empty where none failed."""
    reasons = [(row["artifact"], agreement.rejection(row)) for row in rows]
    return "; ".join(f"{artefact}: {reason}" for artefact, reason in reasons if reason)
