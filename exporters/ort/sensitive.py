"""Search of the node groups that int8 must leave in float, the most harmful first, until the gates pass.

A group is a convolution or product with the nodes that follow it until the next (`quantize.groups`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from exporters.ort.quantize import Calibrated

if TYPE_CHECKING:
    import onnx

MAX_FLOATING = (
    0.5  # share of the groups: with more in float, int8 is hardly smaller or faster than fp32
)


@dataclass(frozen=True)
class Trial:
    """Result of a quantized network on the held-out images: whether all gates pass, and its SQNR in dB."""

    passed: bool
    decibel: float


@dataclass(frozen=True)
class SearchResult:
    """The best network, the groups it leaves in float, the number of trials, and why the search ended."""

    network: onnx.ModelProto
    trial: Trial
    floating: tuple[str, ...]
    trials: int
    ended: Literal["met", "time", "groups"]

    def summary(self) -> str:
        """One line: the groups left in float."""
        if not self.floating:
            return "every node in int8"
        plural = "s" if len(self.floating) > 1 else ""
        line = (
            f"{len(self.floating)} group{plural} of nodes left in float after {self.trials} trials"
        )
        return line if self.ended == "met" else f"{line}, out of {self.ended}"


def search(
    calibrated: Calibrated, evaluate: Callable[[onnx.ModelProto], Trial], seconds: float
) -> SearchResult:
    """Quantize everything; where that fails its gates, leave the most harmful groups in float, within `seconds`.

    First each group is left in float alone, which ranks the groups by the SQNR gained; then the ranked groups are
    added one by one, with a trial after each. Returns the best network, whether it passes or not.
    """
    began = time.monotonic()
    network = calibrated.quantized()
    best = SearchResult(network, evaluate(network), (), 1, "met")
    if best.trial.passed:
        return best
    gains: dict[str, float] = {}
    trials = 1
    for group in calibrated.groups:
        # Half of the time is for the second pass: a ranking of some groups that is applied beats a full one
        # that is not.
        if time.monotonic() - began > seconds / 2:
            break
        gains[group] = evaluate(calibrated.quantized([group])).decibel
        trials += 1
    ranked = sorted(gains, key=lambda name: gains[name], reverse=True)
    limit = int(MAX_FLOATING * len(calibrated.groups))
    ended: Literal["met", "time", "groups"] = "groups"
    for count in range(1, min(len(ranked), limit) + 1):
        if time.monotonic() - began > seconds:
            ended = "time"
            break
        floating = tuple(ranked[:count])
        network = calibrated.quantized(floating)
        trial, trials = evaluate(network), trials + 1
        if trial.passed or trial.decibel > best.trial.decibel:
            best = SearchResult(network, trial, floating, trials, ended)
        if trial.passed:
            ended = "met"
            break
    return replace(best, trials=trials, ended=ended)
