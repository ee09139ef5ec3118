"""Do two sets of logits agree? The figures and the bounds by which the bundle was made, again on the device."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

FP32_REL = 1e-3  # largest difference over the standard deviation between images
FLOOR_DB = {"fp16": 35.0, "int8": 15.0}  # centred signal to quantization noise
BIT_EQUAL_DB = 200.0  # the figure of no difference at all
REACTS = 1e-6  # a spread between images below this share of the largest output is rounding


def judge(
    reference: NDArray[np.float32], got: NDArray[np.float32], precision: str
) -> tuple[str, str]:
    """Both (N, K) -> (PASS | FAIL | UNDECIDED, the figure beside its bound).

    The reference's mean over the images is taken off class by class, so that an offset common to all images
    earns nothing. A reference that answers every image alike can refute, never prove.
    """
    if reference.shape != got.shape:
        return "FAIL", f"outputs are {got.shape}, expected {reference.shape}"
    a, b = reference.astype(np.float64), got.astype(np.float64)
    if not np.isfinite(b).all():
        return "FAIL", "outputs hold NaN or infinity"
    largest, peak = float(np.abs(a - b).max()), float(np.abs(a).max())
    if not float(a.std(axis=0).max()) > REACTS * peak:
        if precision == "fp32" and largest > FP32_REL * peak:
            return "FAIL", f"max abs {largest:.3g} on outputs of {peak:.3g} that do not vary"
        return "UNDECIDED", "the model answers every image alike: nothing to compare"
    signal = float(((a - a.mean(axis=0)) ** 2).sum())
    if precision == "fp32":
        rel = largest / math.sqrt(signal / a.size)
        return _verdict(rel <= FP32_REL), f"max abs / std {rel:.2e}, gate {FP32_REL:g}"
    noise = float(((a - b) ** 2).sum())
    db = 10 * math.log10(signal / noise) if noise else BIT_EQUAL_DB
    floor = FLOOR_DB[precision]
    return _verdict(db >= floor), f"{db:.1f} dB, {precision} gate {floor:g} dB"


def _verdict(kept: bool) -> str:
    return "PASS" if kept else "FAIL"
