"""How sure the teacher is of its answers, from the logits that are stored anyway: R12."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor


def ratios(logits: Tensor) -> dict[str, float | int]:
    """Sum and number of the ratios behind R12, of raw logits (n, K).

    R12 is the mean over views of the largest logit over the second largest. Smaller is better: an overconfident
    teacher tells a student little beside the class. Gosal et al., How to Choose Your Teacher for Fine Grained
    Image Recognition, FGVC workshop at CVPR 2026, arXiv 2605.15689. Views whose second logit is not above 0 are
    left out, which the paper does not do: there the ratio measures nothing.
    """
    first, second = logits.double().topk(2, dim=1).values.unbind(dim=1)
    used = second > 0
    return {"sum": (first[used] / second[used]).sum().item(), "views": int(used.sum())}


def r12(shards: Iterable[Mapping[str, Any]]) -> dict[str, float | int] | None:
    """`mean` and the number of `views` in it, of every shard's `ratios`; None where no view has one."""
    found = [shard["ratios"] for shard in shards]
    views = sum(part["views"] for part in found)
    return {"mean": sum(part["sum"] for part in found) / views, "views": views} if views else None
