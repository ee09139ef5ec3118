"""How a feature is stored, and what that costs: float32, float16, bfloat16, or int8 with a scale a channel."""

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
ERROR_GATE = {  # ||replayed - live|| / ||live|| of a batch, the worst of q, k, v, h, logits
    "float32": 1e-6,
    "float16": 5e-4,
    "bfloat16": 4e-3,
    "int8": 1.5e-2,
}
FLOAT16_END = 65504.0
INT8_END = 127


def encode(x: Tensor, dtype: str) -> tuple[Tensor, Tensor | None]:
    """Features (B, T, ...) float32 -> as stored, and for int8 the scales (B, ...): one a record and channel.

    int8 is symmetric and rounds to nearest; a channel's scale is its largest magnitude over the T tokens / 127.
    Raises UserError: not finite, or beyond float16.
    """
    largest = check_error(x)
    if dtype == "int8":
        scale = x.abs().amax(1).clamp(min=torch.finfo(torch.float32).tiny) / INT8_END
        return (x / scale.unsqueeze(1)).round().clamp(-INT8_END, INT8_END).to(torch.int8), scale
    if dtype == "float16" and largest > FLOAT16_END:
        raise UserError(
            f"cache.dtype: a feature is {largest:.3g}, float16 ends at 65504; use bfloat16"
        )
    return x.to(DTYPES[dtype]), None


def check_error(x: Tensor) -> float:
    """The largest magnitude. Raises UserError: it is not finite."""
    largest = x.abs().max().item()
    if not math.isfinite(largest):
        raise UserError(
            f"cache: the teacher's features hold {largest}; its weights are broken: teach again"
        )
    return largest


def decode(stored: Tensor, scale: Tensor | None) -> Tensor:
    """The inverse of `encode`, up to the error of its dtype; always memory of its own."""
    x = stored.to(torch.float32, copy=True)
    return x if scale is None else x.mul_(scale.unsqueeze(1))


def relative_errors(got: TeacherOutputs, exact: TeacherOutputs) -> dict[str, float]:
    """||got - exact|| / ||exact|| of q, k, v (where the teacher has them), h and logits, over the whole batch."""
    pairs = {"h": (got.h, exact.h), "logits": (got.logits, exact.logits)}
    if got.qkv is not None and exact.qkv is not None:
        pairs |= {n: (got.qkv[:, :, i], exact.qkv[:, :, i]) for i, n in enumerate("qkv")}
    return {n: ((a - b).norm() / b.norm().clamp(min=1e-12)).item() for n, (a, b) in pairs.items()}


def worst(rows: list[dict[str, float]]) -> dict[str, float]:
    """The largest error of each tensor."""
    return {name: max(row[name] for row in rows) for name in rows[0]} if rows else {}


def hold(errors: dict[str, float], dtype: str, what: str, remedy: str) -> None:
    """Raise GateFailed where an error is over the gate of its dtype, or is no number."""
    for name, error in errors.items():
        if not error <= ERROR_GATE[dtype]:
            raise GateFailed(
                f"{what}: {dtype} changes {name} by {error:.2e}, its gate is {ERROR_GATE[dtype]:.1e}; {remedy}"
            )


def finer(dtype: str) -> str:
    """What to try where a dtype is over its gate."""
    better = {"int8": "float16", "bfloat16": "float16", "float16": "float32"}
    return f"use cache.dtype: {better[dtype]}" if dtype in better else "use cache.layout: qkvh"
