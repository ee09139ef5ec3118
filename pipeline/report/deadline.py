"""Share of the calls of a row that took longer than `report.deadline_ms`, with its interval. Torch-free."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

MIN_BLOCKS = 5  # fewer do not give a bootstrap interval
DRAWS = 1000


def over_deadline(
    calls_ms: NDArray[np.float64], block_start: NDArray[np.int64], deadline_ms: float
) -> dict[str, Any]:
    """`share` of calls (n,) in ms over the deadline, `ci` [low, high]: its bootstrap 95 % interval.

    Whole blocks are drawn, block i from calls block_start[i] (b,) on: calls of one block share its disturbance,
    so an interval that takes them as independent (Wilson's) is too narrow. `ci` is None below MIN_BLOCKS blocks,
    and where no call or every call is over: all draws are alike then, and say nothing of a rarer event.
    """
    over = calls_ms > deadline_ms
    share = float(over.mean())
    if len(block_start) < MIN_BLOCKS or share in (0, 1):
        return {"share": share, "ci": None}
    late = np.add.reduceat(over, block_start, dtype=np.int64)
    counts = np.diff(block_start, append=len(calls_ms))
    draws = np.random.default_rng(0).integers(len(counts), size=(DRAWS, len(counts)))
    shares = late[draws].sum(axis=1) / counts[draws].sum(axis=1)
    return {"share": share, "ci": np.percentile(shares, [2.5, 97.5]).tolist()}
