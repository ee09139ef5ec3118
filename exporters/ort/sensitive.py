"""What of a network int8 cannot hold: left in float group by group, the most harmful first, until gates are met.

A group is a convolution or product with the nodes that follow it until the next (`quantize.groups`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from exporters.ort.quantize import Calibrated

if TYPE_CHECKING:
    import onnx

MAX_FLOATING = 0.5  # of the groups: beyond, int8 has lost its point


@dataclass(frozen=True)
class Trial:
    """What the held-out images say of a quantized network: whether all gates are met, and its SQNR in dB."""

    kept: bool
    decibel: float


@dataclass(frozen=True)
class SearchResult:
    """The best network found, the groups it leaves in float, how many were tried, and why the search ended."""

    network: onnx.ModelProto
    judged: Trial
    floating: tuple[str, ...]
    tried: int
    ended: Literal["met", "time", "groups"]

    def told(self) -> str:
        """In words: what is left in float."""
        if not self.floating:
            return "every node in int8"
        plural = "s" if len(self.floating) > 1 else ""
        many = (
            f"{len(self.floating)} group{plural} of nodes left in float after {self.tried} trials"
        )
        return many if self.ended == "met" else f"{many}, out of {self.ended}"


def search(
    calibrated: Calibrated, judge: Callable[[onnx.ModelProto], Trial], seconds: float
) -> SearchResult:
    """Quantize everything; where that fails its gates, free the groups that harm most, in at most `seconds`.

    First every group is freed alone, to rank them by the SQNR it gives back; then they are freed together, the
    best first, a judgement after each. The best network seen is returned, met or not.
    """
    began = time.monotonic()
    network = calibrated.quantized()
    best = SearchResult(network, judge(network), (), 1, "met")
    if best.judged.kept:
        return best
    gains: dict[str, float] = {}
    tried = 1
    for group in calibrated.groups:
        if time.monotonic() - began > seconds / 2:
            break
        gains[group] = judge(calibrated.quantized([group])).decibel
        tried += 1
    ranked = sorted(gains, key=lambda name: gains[name], reverse=True)
    most = int(MAX_FLOATING * len(calibrated.groups))
    ended: Literal["met", "time", "groups"] = "groups"
    for count in range(1, min(len(ranked), most) + 1):
        if time.monotonic() - began > seconds:
            ended = "time"
            break
        floating = tuple(ranked[:count])
        network = calibrated.quantized(floating)
        judged, tried = judge(network), tried + 1
        if judged.kept or judged.decibel > best.judged.decibel:
            best = SearchResult(network, judged, floating, tried, ended)
        if judged.kept:
            ended = "met"
            break
    return SearchResult(best.network, best.judged, best.floating, tried, ended)
