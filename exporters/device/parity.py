"""How far two sets of logits agree: the figures, and the bounds by which a bundle is made and verified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

BIT_EQUAL_DB = 200.0  # the SQNR of no difference at all: beyond float32, and still a number in JSON
MIN_RESPONSE = 1e-6  # between-image std over the largest output below this: rounding, not an answer to the image
FIGURES = ("max_abs", "rel_between_std", "sqnr_centered_db", "top1_agreement")


@dataclass(frozen=True)
class Thresholds:
    """The bounds: fp32 by largest difference over the between-image std, the others by centred SQNR in dB."""

    fp32_rel: float = 1e-3
    fp16_db: float = 35.0
    bf16_db: float = 25.0
    int8_db: float = 15.0


def responds_to_input(reference: NDArray[np.float32]) -> bool:
    """Whether different images get different answers, beyond rounding."""
    a = reference.astype(np.float64)
    return float(a.std(axis=0).max()) > MIN_RESPONSE * float(np.abs(a).max())


def logit_metrics(
    reference: NDArray[np.float32], other: NDArray[np.float32]
) -> dict[str, float | None]:
    """Both (N, K), N >= 2 -> max_abs, rel_between_std, sqnr_centered_db, top1_agreement.

    The reference's mean over the images is subtracted class by class first, so that a constant offset earns
    nothing. None where the figure does not exist: outputs that are not finite, or a reference that gives
    every image the same answer.
    """
    a, b = reference.astype(np.float64), other.astype(np.float64)
    row: dict[str, float | None] = dict.fromkeys(FIGURES)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return row
    largest = row["max_abs"] = float(np.abs(a - b).max())
    if not responds_to_input(reference):
        return row
    centred = a - a.mean(axis=0)
    noise = float(((a - b) ** 2).sum())
    signal = float((centred**2).sum())
    row["rel_between_std"] = largest / math.sqrt(signal / a.size)
    row["sqnr_centered_db"] = 10 * math.log10(signal / noise) if noise else BIT_EQUAL_DB
    row["top1_agreement"] = float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
    return row


def parity_verdict(
    row: dict[str, float | None], largest: float, precision: str, gates: Thresholds
) -> tuple[str, str]:
    """(PASS | FAIL | UNDECIDED, the figure beside its bound). `largest`: the reference's largest absolute output.

    A reference that does not react can refute parity, never prove it.
    """
    if row["max_abs"] is None:
        return "FAIL", "outputs hold NaN or infinity"
    rel, sqnr = row["rel_between_std"], row["sqnr_centered_db"]
    if rel is None or sqnr is None:
        if precision == "fp32" and row["max_abs"] > gates.fp32_rel * largest:
            words = f"max abs {row['max_abs']:.3g} on outputs of {largest:.3g} that do not vary"
            return "FAIL", words
        return (
            "UNDECIDED",
            "the reference does not react to its input: it answers every image alike",
        )
    if precision == "fp32":
        passed, text = rel <= gates.fp32_rel, f"max abs / std {rel:.2e}, gate {gates.fp32_rel:g}"
    else:
        floor = {"fp16": gates.fp16_db, "bf16": gates.bf16_db, "int8": gates.int8_db}[precision]
        passed, text = sqnr >= floor, f"{sqnr:.1f} dB, {precision} gate {floor:g} dB"
    return "PASS" if passed else "FAIL", text


def verify_logits(
    reference: NDArray[np.float32], got: NDArray[np.float32], precision: str
) -> tuple[str, str]:
    """Both (N, K) -> (PASS | FAIL | UNDECIDED, the figure beside its bound)."""
    if reference.shape != got.shape:
        return "FAIL", f"outputs are {got.shape}, expected {reference.shape}"
    largest = float(np.abs(reference).max())
    return parity_verdict(logit_metrics(reference, got), largest, precision, Thresholds())
