"""int8 artefacts of a student in every runtime: accuracy on labelled images, agreement with a reference."""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import agreement, counts, inputs
from exporters.artifact.eager import EagerSession
from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build
from exporters.artifact.session import TARGETS, Array, Target, Unavailable
from exporters.open import RUNTIMES, open_session
from pipeline.core.machine import usable_cores
from pipeline.models.ranges import SUFFIX

if TYPE_CHECKING:
    from torch import nn

INT8 = ("ort-int8", "ov-int8", "rtx-int8")


def top1(logits: Array, labels: NDArray[np.int64]) -> float:
    """Share of the labelled images (label not -1) classified right, from logits (N, K) and labels (N,)."""
    known = labels >= 0
    return float((logits.argmax(axis=1) == labels)[known].mean())


def logits_of(network: nn.Module, description: dict[str, Any], x: Array) -> Array:
    """Logits (N, K) of a PyTorch network for x (N, 3, S, S)."""
    return inputs.run_batches(EagerSession(network, description, usable_cores()), x)


def measure(
    source: Path,
    reference: nn.Module,
    description: dict[str, Any],
    images: tuple[Array, NDArray[np.int64]],
    calibration: Array,
    settings: Build,
) -> list[dict[str, Any]]:
    """A row for each target of INT8: top-1 on labelled images, agreement of the logits with a reference's.

    source: a student.onnx; with the ranges of a training beside it, or else calibrated on (M, 3, S, S), with every
    node in int8. reference: the network that says what int8 must compute. images: x (N, 3, S, S) and labels (N,),
    -1 unknown.
    """
    x, labels = images
    logits = logits_of(reference, description, x)
    exported = Exported(source.parent, {"student": x}, labels, {"student": logits}, calibration)
    trained = source.with_name(f"{source.stem}{SUFFIX}").is_file()
    by = "training" if trained else "calibration"
    return [_row(TARGETS[target], exported, by, settings) for target in INT8]


def _row(target: Target, exported: Exported, by: str, settings: Build) -> dict[str, Any]:
    row: dict[str, Any] = {"target": target.name, "ranges": by, "reason": None}
    row |= dict.fromkeys(("runtime", "top1", "top1_agreement", "sqnr_centered_db", "size_mb"))
    # Nothing is searched to pass a gate: the row is about int8 itself.
    settings = replace(settings, int8_search_s=0.0)
    with tempfile.TemporaryDirectory() as folder:
        try:
            make = RUNTIMES[target.runtime].make
            artefact = make("int8", "student", exported, Path(folder), settings)
            row["size_mb"] = (counts.size_bytes(artefact) or 0) / 1e6
            session = open_session(target, artefact, 1)
        except Unavailable as error:
            built = "built, not run: " if row["size_mb"] else ""
            return {**row, "reason": f"{built}{error}"}
        logits = inputs.run_batches(session, exported.x["student"])
    reference = exported.logits["student"]
    metrics, *_ = agreement.compare_outputs(reference, logits, "int8", settings)
    row |= {key: metrics[key] for key in ("top1_agreement", "sqnr_centered_db")}
    return {**row, "runtime": session.runtime, "top1": top1(logits, exported.labels)}
