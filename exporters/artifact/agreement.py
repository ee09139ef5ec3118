"""How far two sets of logits agree: the figures, the gates, the verdict, and a row of parity.json."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import counts, inputs, metadata
from exporters.artifact.session import Array, Session
from exporters.device import parity
from pipeline.core.errors import GateFailed, UserError

Thresholds = parity.Thresholds  # the bounds
BIT_EQUAL_DB = parity.BIT_EQUAL_DB
ROUNDING = 1e-9  # of a difference of two accuracies
IMAGES = 64


def figures(reference: Array, other: Array) -> dict[str, float | None]:
    """`exporters.device.parity.logit_metrics`. Raises UserError: shapes that differ, fewer than two images."""
    if reference.shape != other.shape:
        raise UserError(
            f"outputs are {reference.shape} and {other.shape}: these are two different networks"
        )
    if len(reference) < 2:
        raise UserError(f"parity: got {len(reference)} image; at least 2 are needed")
    return parity.logit_metrics(reference, other)


def judge(
    row: dict[str, float | None], largest: float, precision: str, bounds: Thresholds
) -> tuple[str, str | None]:
    """`exporters.device.parity.parity_verdict`; a PASS needs no reason."""
    verdict, reason = parity.parity_verdict(row, largest, precision, bounds)
    return verdict, None if verdict == "PASS" else reason


def coarsest_precision(*sessions: Session) -> str:
    """The coarsest precision any of them stores or computes in: what decides the gate."""
    found = {s.precision_effective for s in sessions}
    found |= {s.metadata.get("precision", "fp32") for s in sessions}
    return max(found, key=metadata.PRECISIONS.index)


def parity_row(
    artefact: Path, session: Session, reference: Array, other: Array, bounds: Thresholds
) -> dict[str, Any]:
    """One row of parity.json: the session's outputs against a float32 reference's."""
    found = figures(reference, other)
    verdict, reason = judge(
        found, float(np.abs(reference).max()), coarsest_precision(session), bounds
    )
    told = session.metadata.get("int8")
    return {
        "artifact": artefact.name,
        "runtime": session.runtime,
        "precision_effective": session.precision_effective,
        **({"int8": told} if told else {}),
        **found,
        "images": len(reference),
        "verdict": verdict,
        "reason": reason,
    }


def top1_drop(reference: Array, other: Array, labels: NDArray[np.int64]) -> float | None:
    """Top-1 that `other` (N, K) loses on the labelled images, as a fraction; None where there is none."""
    known = labels >= 0
    if not known.any() or not np.isfinite(other).all():
        return None
    before, after = (float((y.argmax(axis=1) == labels)[known].mean()) for y in (reference, other))
    return before - after


def exceeds(drop: float | None, bound: float) -> bool:
    """Whether a drop is over its bound."""
    return drop is not None and drop > bound + ROUNDING


def add_accuracy(
    found: dict[str, Any],
    reference: Array,
    other: Array,
    labels: NDArray[np.int64],
    bound: float,
) -> dict[str, Any]:
    """A row of parity.json with what top-1 loses; over `bound` its PASS becomes FAIL."""
    drop = top1_drop(reference, other, labels)
    if drop is None:
        return found
    found = {**found, "top1_drop": drop}
    if found["verdict"] == "PASS" and exceeds(drop, bound):
        found |= {"verdict": "FAIL", "reason": f"top-1 falls by {drop:.3f}, gate {bound:g}"}
    return found


def gated_row(
    out: Path,
    sessions: tuple[Session, Session],
    x: Array,
    labels: NDArray[np.int64] | None,
    bound: float,
    force: bool = False,
) -> dict[str, Any]:
    """The row of a conversion to `out`: (its source, what was made of it), shown x and judged by labels if any.

    Of x and the labels as many as fill the batches of both. `force` lets through what parity cannot decide.
    Raises GateFailed: the verdict is FAIL, or UNDECIDED without `force`.
    """
    step = math.lcm(*(session.input_shape[0] or 1 for session in sessions))
    whole = slice(len(x) // step * step)
    reference, made = (inputs.run_batches(session, x[whole]) for session in sessions)
    found = parity_row(out, sessions[1], reference, made, Thresholds())
    if labels is not None:
        found = add_accuracy(found, reference, made, labels[whole], bound)
    require_pass(out, found, force)
    return found


def require_pass(out: Path, row: dict[str, Any], force: bool) -> None:
    """Raise GateFailed where a row's verdict is FAIL, or UNDECIDED without `force`."""
    if row["verdict"] == "FAIL":
        raise GateFailed(f"{out}: {row['reason']}; not written")
    if row["verdict"] == "UNDECIDED" and not force:
        raise GateFailed(
            f"{out}: parity is UNDECIDED, {row['reason']}; not written; --force writes it all the same"
        )


def skipped_row(artefact: str, precision: str, reason: str) -> dict[str, Any]:
    """The row of an artefact that could not run here."""
    empty = dict.fromkeys(
        ("max_abs", "rel_between_std", "sqnr_centered_db", "top1_agreement", "images")
    )
    return {
        "artifact": artefact,
        "runtime": None,
        "precision_effective": precision,
        **empty,
        "verdict": "skipped",
        "reason": reason,
    }


def comparison_images(a: Session, b: Session, folder: Path | None) -> Array:
    """The images both are shown: a folder's, prepared by the notes of whichever carries some, or smooth ones.

    Raises UserError: inputs of different shapes, no image in the folder, or fewer than fill a batch of both.
    """
    if a.input_shape[1:] != b.input_shape[1:]:
        raise UserError(f"inputs are {a.input_shape[1:]} and {b.input_shape[1:]}: not comparable")
    step = math.lcm(a.input_shape[0] or 1, b.input_shape[0] or 1)
    if folder is None:
        return inputs.smooth(math.ceil(IMAGES / 4 / step) * step, *a.input_shape[2:])
    noted = a if metadata.preprocessing(a.metadata) else b
    x = inputs.images_from_folder(folder, noted, max(IMAGES, step))
    if len(x) < step:
        raise UserError(
            f"--images {folder}: got {len(x)} images; expected {step} or more, which fill the batches of both "
            "networks; give more, or leave --images out"
        )
    return x[: len(x) // step * step]


def describe_row(found: dict[str, Any]) -> str:
    """The figures of a row in one line."""
    parts = [f"max abs {found['max_abs']:.2e}" if found["max_abs"] is not None else "not finite"]
    if found["rel_between_std"] is not None:
        parts += [
            f"over std {found['rel_between_std']:.2e}",
            f"SQNR {found['sqnr_centered_db']:.1f} dB",
            f"top-1 agreement {found['top1_agreement']:.3f}",
        ]
    reason = f" ({found['reason']})" if found["reason"] else ""
    return f"{', '.join(parts)}: {found['verdict']}{reason}"


def print_result(out: Path, make: Callable[[], dict[str, Any]]) -> None:
    """Make `out`, and print its size, the seconds it took and what its row says."""
    start = time.perf_counter()
    found = make()
    seconds, size = time.perf_counter() - start, (counts.size_bytes(out) or 0) / 1e6
    told = [found["precision_effective"], *filter(None, [found.get("int8")]), describe_row(found)]
    print(f"{out}: {size:.2f} MB in {seconds:.1f} s, computes in {', '.join(told)}")
