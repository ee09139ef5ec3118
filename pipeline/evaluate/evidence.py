"""The evidence behind the accuracy: confusions, the most confident mistakes, attention maps."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.prepared import Prepared, spread

SCHEMA = "cakd.evidence/1"
MISTAKES, IMAGES = 12, 6


def errors(logits: Tensor, prepared: Prepared, rows: NDArray[np.int64]) -> dict[str, Any]:
    """List `confusion` as [true, predicted, count], and the `mistakes` of the highest confidence (a fraction).

    logits (n, K) for the rows (n,) of the prepared folder.
    """
    confidence, predicted = (t.numpy() for t in logits.softmax(dim=1).max(dim=1))
    labels = prepared.labels[rows]
    counts = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    wrong = np.flatnonzero(predicted != labels)
    top = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return {
        "confusion": [[*pair, count] for pair, count in sorted(counts.items())],
        "mistakes": [
            {
                "row": int(rows[i]),
                "label": int(labels[i]),
                "predicted": int(predicted[i]),
                "confidence": round(float(confidence[i]), 4),
            }
            for i in top
        ],
    }


def one_per_class(prepared: Prepared, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """Select the first image of IMAGES classes, evenly spaced; fewer where there are fewer classes."""
    _, first = np.unique(prepared.labels[rows], return_index=True)
    return spread(rows[first], IMAGES)


def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """Compute the attention (B, N) that each patch receives from Q, K (B, H, N, d); uniform attention gives 1.

    N times the mean over heads and queries of softmax(Q K^T / sqrt(d)), the weights of eq. 2, over the N patch
    tokens: without prefix tokens and swap.
    """
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return q.shape[2] * weights.mean(dim=(1, 2))


def attention_maps(
    maps: dict[str, Tensor], grid: list[int], rows: NDArray[np.int64]
) -> dict[str, Any]:
    """Convert the attention that each patch receives, (n, N) by model, to JSON."""
    return {
        "grid": grid,
        "rows": rows.tolist(),
        "received": {
            name: [[round(v, 3) for v in row] for row in received.tolist()]
            for name, received in maps.items()
        },
    }
