"""Agreement of two sets of logits: metrics, gates, verdict, and a row of parity.json."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import counts, inputs, metadata
from exporters.artifact.session import Array, Session
from exporters.device import parity
from pipeline.core.errors import GateFailed, UserError

Thresholds = parity.Thresholds
BIT_EQUAL_DB = parity.BIT_EQUAL_DB
ACCURACY_EPS = 1e-9  # float error of a difference of two accuracies
IMAGES = 64
TRAINED = (
    "int8_sqnr_db"  # metadata of a network that was trained under int8: SQNR of its simulation
)
MARGIN_DB = 3.0  # that its export may lie below it


def compare_outputs(
    reference: Array, other: Array, precision: str, thresholds: Thresholds
) -> tuple[dict[str, float | None], str, str | None]:
    """Both (N, K) -> (metrics, verdict, reason) of `exporters.device.parity`; a PASS has no reason.

    Raises UserError: shapes that differ, fewer than two images.
    """
    if reference.shape != other.shape:
        raise UserError(
            f"outputs: got shapes {reference.shape} and {other.shape}; expected one shape; "
            "compare two files of the same network"
        )
    if len(reference) < 2:
        raise UserError(f"parity: got {len(reference)} image; expected 2 or more; give more images")
    metrics, verdict, reason = parity.compare_logits(reference, other, precision, thresholds)
    return metrics, verdict, None if verdict == "PASS" else reason


def coarsest_precision(*sessions: Session) -> str:
    """The coarsest precision any of the sessions stores or computes in, which decides the gate."""
    computed = {s.precision_effective for s in sessions}
    stored = {s.metadata.get("precision", "fp32") for s in sessions}
    return max(computed | stored, key=metadata.PRECISIONS.index)


def parity_row(
    artefact: Path, session: Session, reference: Array, other: Array, thresholds: Thresholds
) -> dict[str, Any]:
    """One row of parity.json: the session's outputs (N, K) against a float32 reference's.

    Raises UserError as `compare_outputs`.
    """
    precision = coarsest_precision(session)
    metrics, verdict, reason = compare_outputs(reference, other, precision, thresholds)
    int8 = session.metadata.get("int8")
    return {
        "artifact": artefact.name,
        "runtime": session.runtime,
        "precision_effective": session.precision_effective,
        **({"int8": int8} if int8 else {}),
        **metrics,
        "images": len(reference),
        "verdict": verdict,
        "reason": reason,
    }


def fair_thresholds(session: Session, thresholds: Thresholds) -> Thresholds:
    """The gates of an artefact: int8 that was trained may be as far from float32 as its simulation was."""
    try:
        expected = float(session.metadata[TRAINED])
    except (KeyError, ValueError):
        return thresholds
    return replace(thresholds, int8_db=min(thresholds.int8_db, expected - MARGIN_DB))


def skipped_row(artefact: str, precision: str, reason: str) -> dict[str, Any]:
    """The row of parity.json of an artefact that could not run here."""
    return {
        "artifact": artefact,
        "runtime": None,
        "precision_effective": precision,
        **dict.fromkeys((*parity.METRICS, "images")),
        "verdict": "skipped",
        "reason": reason,
    }


def top1_drop(reference: Array, other: Array, labels: NDArray[np.int64]) -> float | None:
    """Top-1 that `other` (N, K) loses on the labelled images, as a fraction; None without labels (-1)."""
    known = labels >= 0
    if not known.any() or not np.isfinite(other).all():
        return None
    before, after = (float((y.argmax(axis=1) == labels)[known].mean()) for y in (reference, other))
    return before - after


def exceeds(drop: float | None, max_drop: float) -> bool:
    """Whether a drop of top-1 is over its bound."""
    return drop is not None and drop > max_drop + ACCURACY_EPS


def add_accuracy(
    row: dict[str, Any],
    reference: Array,
    other: Array,
    labels: NDArray[np.int64],
    max_drop: float,
) -> dict[str, Any]:
    """The row with `top1_drop`, where labels allow it; a drop over `max_drop` turns its PASS into FAIL."""
    drop = top1_drop(reference, other, labels)
    if drop is None:
        return row
    row = {**row, "top1_drop": drop}
    if row["verdict"] == "PASS" and exceeds(drop, max_drop):
        row |= {"verdict": "FAIL", "reason": f"top-1 falls by {drop:.3f}, gate {max_drop:g}"}
    return row


def gated_row(
    out: Path,
    sessions: tuple[Session, Session],
    x: Array,
    labels: NDArray[np.int64] | None,
    max_drop: float,
    force: bool = False,
) -> dict[str, Any]:
    """The row of a conversion to `out`, from sessions of its source and of what was converted.

    Both run as many of the images x (N, C, S, S) as fill their batches; labels, if any, add the loss of top-1.
    Raises GateFailed: the verdict is FAIL, or UNDECIDED without `force`.
    """
    whole = slice(_whole_batches(len(x), *sessions))
    reference, converted = (inputs.run_batches(session, x[whole]) for session in sessions)
    gates = fair_thresholds(sessions[1], Thresholds())
    row = parity_row(out, sessions[1], reference, converted, gates)
    if labels is not None:
        row = add_accuracy(row, reference, converted, labels[whole], max_drop)
    require_pass(out, row, force)
    return row


def rejection(row: Mapping[str, Any], force: bool = False) -> str | None:
    """The reason why a network with this row may not be used: FAIL, or UNDECIDED without `force`; else None."""
    if row["verdict"] == "UNDECIDED" and not force:
        return f"parity is UNDECIDED, {row['reason']}"
    return row["reason"] if row["verdict"] == "FAIL" else None


def require_pass(
    out: Path, row: Mapping[str, Any], force: bool = False, fail: str = "", remedy: str = ""
) -> None:
    """Raise GateFailed where the row is rejected; `fail` stands before the reason of a FAIL, `remedy` after it."""
    reason = rejection(row, force)
    if reason and row["verdict"] == "UNDECIDED":
        raise GateFailed(
            f"{out}: {reason}; not written; train it further, or export it with --force"
        )
    if reason:
        raise GateFailed(f"{out}: {fail}{reason}; not written{remedy and f'; {remedy}'}")


def _whole_batches(count: int, *sessions: Session) -> int:
    """The largest number of images, `count` at most, that fills the batches of all sessions."""
    step = _common_batch(*sessions)
    return count // step * step


def _common_batch(*sessions: Session) -> int:
    """The fewest images that fill the batches of all sessions."""
    return math.lcm(*(session.input_shape[0] or 1 for session in sessions))


def comparison_images(a: Session, b: Session, folder: Path | None) -> Array:
    """The images (N, C, S, S) that both sessions run: a folder's, or seeded smooth ones.

    A folder is prepared by the preprocessing metadata of whichever session carries some.
    Raises UserError: inputs of different shapes, no image in the folder, or fewer than fill a batch of both.
    """
    if a.input_shape[1:] != b.input_shape[1:]:
        raise UserError(
            f"inputs: got {a.input_shape[1:]} and {b.input_shape[1:]}; expected one image shape; "
            "compare two files of the same network"
        )
    step = _common_batch(a, b)
    if folder is None:
        return inputs.smooth_for(a, math.ceil(IMAGES / 4 / step) * step)
    described = a if metadata.preprocessing(a.metadata) else b
    x = inputs.images_from_folder(folder, described, max(IMAGES, step))
    if len(x) < step:
        raise UserError(
            f"--images {folder}: got {len(x)} images; expected {step} or more, which fill the batches of both "
            "networks; give more, or leave --images out"
        )
    return x[: _whole_batches(len(x), a, b)]


def describe_row(row: dict[str, Any]) -> str:
    """The metrics and the verdict of a row in one line."""
    metrics = [f"max abs {row['max_abs']:.2e}" if row["max_abs"] is not None else "not finite"]
    if row["rel_between_std"] is not None:
        metrics += [
            f"over std {row['rel_between_std']:.2e}",
            f"SQNR {row['sqnr_centered_db']:.1f} dB",
            f"top-1 agreement {row['top1_agreement']:.3f}",
        ]
    reason = f" ({row['reason']})" if row["reason"] else ""
    return f"{', '.join(metrics)}: {row['verdict']}{reason}"


def print_result(out: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Call `make`, which writes `out` and returns its row, and print size, seconds and parity."""
    start = time.perf_counter()
    row = make()
    seconds, size = time.perf_counter() - start, (counts.size_bytes(out) or 0) / 1e6
    traits = [row["precision_effective"], *filter(None, [row.get("int8")]), describe_row(row)]
    print(f"{out}: {size:.2f} MB in {seconds:.1f} s, computes in {', '.join(traits)}")
