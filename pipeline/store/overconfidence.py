"""Overconfidence of the teacher, R12, from the logits that are stored anyway."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def ratios(logits: Tensor) -> dict[str, float | int]:
    """Sum and count the ratios of R12 over raw logits (n, K).

    R12 is the mean over views of the largest logit over the second largest. Smaller is better: an overconfident
    teacher gives a student little beyond the class. Gosal et al., How to Choose Your Teacher for Fine Grained
    Image Recognition, FGVC workshop at CVPR 2026, arXiv 2605.15689. Views whose second logit is not above 0 are
    left out, unlike in the paper: there the ratio measures nothing.
    """
    first, second = logits.double().topk(2, dim=1).values.unbind(dim=1)
    used = second > 0
    return {"sum": (first[used] / second[used]).sum().item(), "views": int(used.sum())}


def r12(shards: Iterable[Mapping[str, Any]]) -> dict[str, float | int] | None:
    """Combine every shard's `ratios` to their `mean` over `views`; None where no view has one."""
    rows = [shard["ratios"] for shard in shards]
    views = sum(row["views"] for row in rows)
    return {"mean": sum(row["sum"] for row in rows) / views, "views": views} if views else None
