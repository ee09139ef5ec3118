"""Encoding of stored features: float32, float16, bfloat16, or int8 with a scale per channel, and its error."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pipeline.core.errors import GateFailed, UserError
from pipeline.models.teacher import TeacherOutputs

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "int8": torch.int8,
}
# Largest ||replayed - live|| / ||live|| over a batch that is accepted, of q, k, v, h and logits each.
ERROR_GATE = {
    "float32": 1e-6,
    "float16": 5e-4,
    "bfloat16": 4e-3,
    "int8": 1.5e-2,
}
MAX_FLOAT16 = 65504.0
MAX_INT8 = 127


def encode(x: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Encode features (B, T, ...) float32; for int8 also the scales (B, ...), one per record and channel.

    int8 is symmetric and rounds to nearest; a channel's scale is its largest magnitude over the T tokens / 127.
    Raises UserError: a feature that is not finite, or above the range of float16.
    """
    largest = largest_magnitude(x)
    if dtype == "int8":
        # tiny: a channel of zeros must not divide by zero.
        scale = x.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / MAX_INT8
        return (x / scale.unsqueeze(1)).round().clamp(-MAX_INT8, MAX_INT8).to(torch.int8), scale
    if dtype == "float16" and largest > MAX_FLOAT16:
        raise UserError(
            f"cache.dtype: got float16 for a feature of {largest:.3g}; expected at most 65504; set it to bfloat16"
        )
    return x.to(DTYPES[dtype]), None


def largest_magnitude(x: Tensor) -> float:
    """Return the largest absolute value. Raises UserError: it is not finite."""
    largest = x.abs().max().item()
    if not math.isfinite(largest):
        raise UserError(
            f"cache: got {largest} in the teacher's features; expected finite numbers; train the teacher again"
        )
    return largest


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """Invert `encode`, up to the error of its dtype."""
    x = stored.to(torch.float32, copy=True)  # a copy always: the reader reuses its buffers
    return x if scale is None else x.mul_(scale.unsqueeze(1))


def relative_errors(got: TeacherOutputs, exact: TeacherOutputs) -> dict[str, float]:
    """Compute ||got - exact|| / ||exact|| of logits and, where both have them, h, q, k and v over a batch."""
    pairs = {"logits": (got.logits, exact.logits)}
    if got.h is not None and exact.h is not None:
        pairs["h"] = (got.h, exact.h)
    if got.qkv is not None and exact.qkv is not None:
        pairs |= {n: (got.qkv[:, :, i], exact.qkv[:, :, i]) for i, n in enumerate("qkv")}
    return {n: ((a - b).norm() / b.norm().clamp(min=1e-12)).item() for n, (a, b) in pairs.items()}


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return the largest error of each tensor over the rows."""
    return {name: max(row[name] for row in rows) for name in rows[0]} if rows else {}


def check_gate(errors: dict[str, float], dtype: str, what: str, remedy: str) -> None:
    """Compare errors with the gate of their dtype. Raises GateFailed: one is above it, or NaN."""
    for name, error in errors.items():
        if not error <= ERROR_GATE[dtype]:
            raise GateFailed(
                f"{what}: relative error of {name} in {dtype}: got {error:.2e}; expected at most "
                f"{ERROR_GATE[dtype]:.1e}; {remedy}"
            )


def finer(dtype: str) -> str:
    """Name the setting to try where a dtype is above its gate."""
    better = {"int8": "float16", "bfloat16": "float16", "float16": "float32"}
    return f"set cache.dtype: {better[dtype]}" if dtype in better else "set cache.layout: qkvh"
