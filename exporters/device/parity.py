"""Parity metrics of two sets of logits, and the thresholds by which a bundle is made and verified."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

# SQNR reported for identical outputs: beyond what float32 resolves, and finite, so that JSON can hold it.
BIT_EQUAL_DB = 200.0
# A between-image std below this share of the largest output is rounding, not a response to the image.
MIN_RESPONSE = 1e-6
METRICS = ("max_abs", "rel_between_std", "sqnr_centered_db", "top1_agreement")


@dataclass(frozen=True)
class Thresholds:
    """Parity gates: fp32 by largest difference over between-image std, the others by centred SQNR in dB."""

    fp32_rel: float = 1e-3
    fp16_db: float = 35.0
    bf16_db: float = 25.0
    int8_db: float = 15.0


def responds_to_input(logits: NDArray[np.float32]) -> bool:
    """Whether logits (N, K) differ between images by more than rounding."""
    values = logits.astype(np.float64)
    return float(values.std(axis=0).max()) > MIN_RESPONSE * float(np.abs(values).max())


def logit_metrics(
    reference: NDArray[np.float32], other: NDArray[np.float32]
) -> dict[str, float | None]:
    """Both (N, K), N >= 2 -> max_abs, rel_between_std, sqnr_centered_db, top1_agreement.

    None where a metric does not exist: outputs that are not finite, or a reference that gives every image
    the same answer.
    """
    a, b = reference.astype(np.float64), other.astype(np.float64)
    metrics: dict[str, float | None] = dict.fromkeys(METRICS)
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        return metrics
    largest = metrics["max_abs"] = float(np.abs(a - b).max())
    if not responds_to_input(reference):
        return metrics
    # The mean over the images goes first, class by class: a constant offset shared by all images would
    # count as signal and hide noise that changes the ranking.
    signal = float(((a - a.mean(axis=0)) ** 2).sum())
    noise = float(((a - b) ** 2).sum())
    metrics["rel_between_std"] = largest / math.sqrt(signal / a.size)
    metrics["sqnr_centered_db"] = 10 * math.log10(signal / noise) if noise else BIT_EQUAL_DB
    metrics["top1_agreement"] = float((a.argmax(axis=1) == b.argmax(axis=1)).mean())
    return metrics


def parity_verdict(
    metrics: dict[str, float | None], largest: float, precision: str, thresholds: Thresholds
) -> tuple[str, str]:
    """(PASS | FAIL | UNDECIDED, the metric beside its gate). `largest`: the reference's largest absolute output.

    A reference that does not respond to its input can refute parity, never prove it.
    """
    if metrics["max_abs"] is None:
        return "FAIL", "outputs hold NaN or infinity"
    rel, sqnr = metrics["rel_between_std"], metrics["sqnr_centered_db"]
    if rel is None or sqnr is None:
        if precision == "fp32" and metrics["max_abs"] > thresholds.fp32_rel * largest:
            reason = (
                f"max abs {metrics['max_abs']:.3g} on outputs of {largest:.3g} that do not vary"
            )
            return "FAIL", reason
        return "UNDECIDED", "the reference does not react to its input: all images get one answer"
    if precision == "fp32":
        gate = thresholds.fp32_rel
        return _verdict(rel <= gate), f"max abs / std {rel:.2e}, gate {gate:g}"
    gate = float(getattr(thresholds, f"{precision}_db"))
    return _verdict(sqnr >= gate), f"{sqnr:.1f} dB, {precision} gate {gate:g} dB"


def _verdict(passed: bool) -> str:
    return "PASS" if passed else "FAIL"


def compare_logits(
    reference: NDArray[np.float32],
    other: NDArray[np.float32],
    precision: str,
    thresholds: Thresholds | None = None,
) -> tuple[dict[str, float | None], str, str]:
    """Both (N, K) -> (metrics, PASS | FAIL | UNDECIDED, the metric beside its gate)."""
    if reference.shape != other.shape:
        reason = f"outputs: got shape {other.shape}; expected {reference.shape}"
        return dict.fromkeys(METRICS), "FAIL", reason
    metrics = logit_metrics(reference, other)
    largest = float(np.abs(reference).max())
    return metrics, *parity_verdict(metrics, largest, precision, thresholds or Thresholds())
