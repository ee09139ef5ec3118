"""What the figures are made of: what is taken for what, the surest mistakes, and where the models look."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.data.prepared import Prepared, spread

SCHEMA = "cakd.evidence/1"
MISTAKES, PICTURES = 12, 6


def errors(logits: Tensor, prepared: Prepared, rows: NDArray[np.int64]) -> dict[str, Any]:
    """`confusion` as [true, predicted, count], and the `mistakes` with the highest confidence, a fraction.

    logits (n, K) of the rows (n,) of the prepared folder.
    """
    confidence, predicted = (t.numpy() for t in logits.softmax(dim=1).max(dim=1))
    labels = prepared.labels[rows]
    counts = Counter(zip(labels.tolist(), predicted.tolist(), strict=True))
    wrong = np.flatnonzero(predicted != labels)
    surest = wrong[np.argsort(-confidence[wrong], kind="stable")][:MISTAKES]
    return {
        "confusion": [[true, said, n] for (true, said), n in sorted(counts.items())],
        "mistakes": [
            {
                "row": int(rows[i]),
                "label": int(labels[i]),
                "predicted": int(predicted[i]),
                "confidence": round(float(confidence[i]), 4),
            }
            for i in surest
        ],
    }


def one_a_class(prepared: Prepared, rows: NDArray[np.int64]) -> NDArray[np.int64]:
    """PICTURES rows spread over the classes, the first picture of each; fewer where there are fewer classes."""
    _, first = np.unique(prepared.labels[rows], return_index=True)
    return spread(rows[first], PICTURES)


def received_attention(q: Tensor, k: Tensor) -> Tensor:
    """Q, K (B, H, N, d) -> (B, N): the attention each patch receives, 1 where it were uniform.

    N times the mean over heads and queries of softmax(Q K^T / sqrt(d)), the weights inside eq. 2, over the N patch
    tokens: prefix tokens cut off, no swap.
    """
    weights = (q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    return q.shape[2] * weights.mean(dim=(1, 2))


def attention_maps(
    maps: dict[str, Tensor], grid: list[int], rows: NDArray[np.int64]
) -> dict[str, Any]:
    """The attention each patch receives, (n, N) by model, as evidence.json holds it."""
    return {
        "grid": grid,
        "rows": rows.tolist(),
        "received": {
            name: [[round(v, 3) for v in row] for row in found.tolist()]
            for name, found in maps.items()
        },
    }
