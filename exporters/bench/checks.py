"""What two artefacts can be compared by without a clock: hard gates, each a named row, free of noise.

A candidate may not do more than its baseline unless `--allow` says so; it may always do less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from exporters.artifact import agreement, counts, metadata
from exporters.artifact.session import Array
from pipeline.core import artifacts
from pipeline.core.errors import UserError

Value = int | str | None
Verdict = Literal["PASS", "FAIL", "ALLOWED", "UNKNOWN"]

SLACK = 0.01  # of parameters, MACs and bytes: a class more, a padded channel
NOTES_BYTES = 4096  # names, hashes and versions inside a file may grow by this much
UNCHANGED, NONE_NEW = "unchanged", "no new type"
CHECKS = (
    *("precision", "opset", "operators", "nodes", "qdq"),
    *("params", "macs", "bytes", "parity"),
)


@dataclass(frozen=True)
class CompareCheck:
    """One row: what the baseline has, what the candidate has, what it may have."""

    name: str
    baseline: Value
    candidate: Value
    limit: Value
    verdict: Verdict


@dataclass(frozen=True)
class Side:
    """One artefact as the gates see it. `logits` (N, K) answer the same pictures on both sides."""

    artefact: Path
    precision: str | None
    params: int | None
    macs: int | None
    figures: counts.ModelCounts
    notes: Mapping[str, str]
    logits: Array | None

    @property
    def size(self) -> int | None:
        """Bytes of the artefact with the weights beside it."""
        return counts.size_bytes(self.artefact)


def compare_checks(
    candidate: Side, baseline: Side, allowed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """Every gate as a row of the comparison; a FAIL named in `allowed` is ALLOWED."""
    a, b = candidate, baseline
    found = [
        _same("precision", a.precision, b.precision),
        _same("opset", a.figures.opset, b.figures.opset),
        _operators(a.figures.operators, b.figures.operators),
        _at_most("nodes", _count(a.figures.operators), _count(b.figures.operators)),
        _same(
            "qdq", _count(a.figures.operators, counts.QDQ), _count(b.figures.operators, counts.QDQ)
        ),
        _at_most("params", a.params, b.params, SLACK),
        _at_most("macs", a.macs, b.macs, SLACK),
        _at_most("bytes", a.size, b.size, SLACK, NOTES_BYTES),
        parity_check(a, b),
    ]
    rows = [asdict(gate) for gate in found]
    for row in rows:
        if row["verdict"] == "FAIL" and row["name"] in allowed:
            row["verdict"] = "ALLOWED"
    return rows


def _verdict(kept: bool, *values: Value) -> Verdict:
    if None in values:
        return "UNKNOWN"
    return "PASS" if kept else "FAIL"


def _same(name: str, candidate: Value, baseline: Value) -> CompareCheck:
    kept = _verdict(candidate == baseline, candidate, baseline)
    return CompareCheck(name, baseline, candidate, UNCHANGED, kept)


def _at_most(
    name: str, candidate: int | None, baseline: int | None, slack: float = 0.0, more: int = 0
) -> CompareCheck:
    limit = None if baseline is None else int(baseline * (1 + slack)) + more
    kept = candidate is not None and limit is not None and candidate <= limit
    return CompareCheck(name, baseline, candidate, limit, _verdict(kept, candidate, baseline))


def _operators(candidate: dict[str, int] | None, baseline: dict[str, int] | None) -> CompareCheck:
    had, has = (None if side is None else f"{len(side)} types" for side in (baseline, candidate))
    new = [f"{kind} {n}" for kind, n in (candidate or {}).items() if kind not in (baseline or {})]
    if has and new:
        has = f"{has}, new: {', '.join(new)}"
    return CompareCheck("operators", had, has, NONE_NEW, _verdict(not new, had, has))


def _count(operators: dict[str, int] | None, of: Collection[str] | None = None) -> int | None:
    if operators is None:
        return None
    return sum(n for kind, n in operators.items() if of is None or kind in of)


def parity_check(candidate: Side, baseline: Side) -> CompareCheck:
    """Same weights must give the same answers; of other weights the parity row of their build is asked."""
    weights = [side.notes.get("weights_sha256") for side in (candidate, baseline)]
    if weights[0] and weights[0] == weights[1]:
        return CompareCheck("parity", "the same weights", *_answers(candidate, baseline))
    had, has = _built(baseline.artefact), _built(candidate.artefact)
    return CompareCheck("parity", had, has, "PASS", _verdict(has == "PASS", has))


def _answers(candidate: Side, baseline: Side) -> tuple[str | None, str, Verdict]:
    """(figure, limit, verdict) of the answers to the same pictures, by the coarser of both precisions."""
    a, b = candidate.logits, baseline.logits
    kinds = [side.precision for side in (candidate, baseline)]
    kinds += [side.notes.get("precision") for side in (candidate, baseline)]
    precision = max(filter(None, [*kinds, "fp32"]), key=metadata.PRECISIONS.index)
    limit = f"as the baseline answers, within the {precision} gate"
    if a is None or b is None or a.shape != b.shape:
        return None, limit, "UNKNOWN"
    row = agreement.figures(b, a)
    verdict, reason = agreement.judge(
        row, float(np.abs(b).max()), precision, agreement.Thresholds()
    )
    judged: Verdict = "FAIL" if verdict == "FAIL" else "PASS" if verdict == "PASS" else "UNKNOWN"
    return reason or verdict, limit, judged


def _built(artefact: Path) -> str | None:
    """The verdict that the build beside it gave this file; None where there is none."""
    try:
        rows = artifacts.read_json(artefact.parent / "parity.json", "cakd.parity/1")["rows"]
    except UserError:
        return None
    told = [row["verdict"] for row in rows if row["artifact"] == artefact.name]
    return told[0] if told and told[0] != "skipped" else None
