"""Two models on the same images: what each alone gets right, and the difference with its 95 % interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from pipeline.distill.methods.table import reads, terms_of

Z = 1.959964  # of a two-sided 95 % interval
Hits = NDArray[np.bool_]  # (n,): which images a model gets right


def interval(better: int, worse: int, n: int) -> tuple[float, float]:
    """The 95 % interval of (better - worse) / n, a difference of two shares of the same `n` images; fractions.

    Wald's interval after half an image is added to each of the four cells, cut at -1 and 1: "Wald+2" of Agresti
    and Min, Simple improved confidence intervals for comparing matched proportions, Statistics in Medicine 24
    (2005), 729-740. Unlike Wald's own, it has a width where the two models never differ.
    """
    centre = (better - worse) / (n + 2)
    spread = Z * math.sqrt(better + worse + 1 - (better - worse) ** 2 / (n + 2)) / (n + 2)
    return max(-1.0, centre - spread), min(1.0, centre + spread)


def difference(own: Hits, other: Hits) -> dict[str, float | int]:
    """`points` of top-1 that `own` is above `other`, their interval `low` to `high`, and the discordant counts.

    `better` images only `own` gets right, `worse` only `other`. Both (n,), of the same images in the same order.
    """
    better, worse = int((own & ~other).sum()), int((other & ~own).sum())
    low, high = interval(better, worse, len(own))
    points = {"points": (better - worse) / len(own), "low": low, "high": high}
    return {"better": better, "worse": worse, **{key: 100 * v for key, v in points.items()}}


def baselines(method: str, trained: Sequence[str]) -> list[str]:
    """What a method, or the `teacher`, is compared with: `plain`, and the control on its batches and transform.

    Only those that were trained. A method that reads no teacher is itself a control, and has none.
    """
    baselines = ["plain"]
    if method != "teacher" and reads(method, "teacher"):
        trans = "trans" in terms_of(method)
        controls = [m for m in trained if "control" in m.split("+")]
        baselines += [m for m in controls if ("trans" in terms_of(m)) == trans]
    return [m for m in baselines if m in trained and m != method]


def against(hits: Mapping[str, Hits]) -> dict[str, dict[str, dict[str, float | int]]]:
    """Model to baseline to their difference, for the `teacher` and every method in `hits`."""
    trained = [name for name in hits if name != "teacher"]
    return {
        name: {other: difference(own, hits[other]) for other in baselines(name, trained)}
        for name, own in hits.items()
    }
