"""Checks of two artefacts that need no clock: each a named row, free of noise.

A candidate may not do more than its baseline unless `--allow` says so; it may always do less.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from exporters.artifact import agreement, counts, metadata
from exporters.artifact.session import Array
from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.core.formats import ParityFile

Value = int | str | None
Verdict = Literal["PASS", "FAIL", "ALLOWED", "UNKNOWN"]

SLACK = 0.01  # of parameters, MACs and bytes: one class more, a padded channel
METADATA_BYTES = 4096  # growth allowed for names, hashes and versions inside a file
CHECKS = ("precision", "opset", "operators", "nodes", "qdq", "params", "macs", "bytes", "parity")


@dataclass(frozen=True)
class CompareCheck:
    """One row: the values of baseline and candidate, and the limit of the latter."""

    name: str
    baseline: Value
    candidate: Value
    limit: Value
    verdict: Verdict


@dataclass(frozen=True)
class Side:
    """One artefact as the checks see it. `logits` (N, K) are of the same images on both sides."""

    artefact: Path
    precision: str | None
    params: int | None
    macs: int | None
    counts: counts.ModelCounts
    metadata: Mapping[str, str]
    logits: Array | None


def compare_checks(
    candidate: Side, baseline: Side, allowed: Collection[str] = ()
) -> list[dict[str, Any]]:
    """All checks as rows of the comparison; a FAIL named in `allowed` is ALLOWED."""
    a, b = candidate, baseline
    operators = a.counts.operators, b.counts.operators
    sizes = counts.size_bytes(a.artefact), counts.size_bytes(b.artefact)
    checks = [
        _same("precision", a.precision, b.precision),
        _same("opset", a.counts.opset, b.counts.opset),
        _no_new_operators(*operators),
        _at_most("nodes", _count(operators[0]), _count(operators[1])),
        _same("qdq", *(_count(side, counts.QDQ) for side in operators)),
        _at_most("params", a.params, b.params, SLACK),
        _at_most("macs", a.macs, b.macs, SLACK),
        _at_most("bytes", *sizes, SLACK, METADATA_BYTES),
        parity_check(a, b),
    ]
    rows = [asdict(check) for check in checks]
    for row in rows:
        if row["verdict"] == "FAIL" and row["name"] in allowed:
            row["verdict"] = "ALLOWED"
    return rows


def _verdict(passed: bool, *values: Value) -> Verdict:
    if None in values:
        return "UNKNOWN"
    return "PASS" if passed else "FAIL"


def _same(name: str, candidate: Value, baseline: Value) -> CompareCheck:
    verdict = _verdict(candidate == baseline, candidate, baseline)
    return CompareCheck(name, baseline, candidate, "unchanged", verdict)


def _at_most(
    name: str, candidate: int | None, baseline: int | None, slack: float = 0.0, more: int = 0
) -> CompareCheck:
    limit = None if baseline is None else int(baseline * (1 + slack)) + more
    passed = candidate is not None and limit is not None and candidate <= limit
    return CompareCheck(name, baseline, candidate, limit, _verdict(passed, candidate, baseline))


def _no_new_operators(
    candidate: dict[str, int] | None, baseline: dict[str, int] | None
) -> CompareCheck:
    before, after = (None if o is None else f"{len(o)} types" for o in (baseline, candidate))
    new = [f"{kind} {n}" for kind, n in (candidate or {}).items() if kind not in (baseline or {})]
    verdict = _verdict(not new, before, after)
    if after and new:
        after = f"{after}, new: {', '.join(new)}"
    return CompareCheck("operators", before, after, "no new type", verdict)


def _count(operators: dict[str, int] | None, of: Collection[str] | None = None) -> int | None:
    if operators is None:
        return None
    return sum(n for kind, n in operators.items() if of is None or kind in of)


def parity_check(candidate: Side, baseline: Side) -> CompareCheck:
    """Compare the logits where both have the same weights; else the parity rows of their builds."""
    weights = [side.metadata.get("weights_sha256") for side in (candidate, baseline)]
    if weights[0] and weights[0] == weights[1]:
        return CompareCheck("parity", "the same weights", *_logit_parity(candidate, baseline))
    before, after = _build_verdict(baseline.artefact), _build_verdict(candidate.artefact)
    return CompareCheck("parity", before, after, "PASS", _verdict(after == "PASS", after))


def _logit_parity(candidate: Side, baseline: Side) -> tuple[str | None, str, Verdict]:
    """(metric, limit, verdict) of the logits of the same images, by the coarser of both precisions."""
    a, b = candidate.logits, baseline.logits
    precisions = [side.precision for side in (candidate, baseline)]
    precisions += [side.metadata.get("precision") for side in (candidate, baseline)]
    precision = max(filter(None, [*precisions, "fp32"]), key=metadata.PRECISIONS.index)
    limit = f"the baseline's outputs, within the {precision} gate"
    if a is None or b is None or a.shape != b.shape:
        return None, limit, "UNKNOWN"
    _, verdict, reason = agreement.compare_outputs(b, a, precision, agreement.Thresholds())
    decided: Verdict = "FAIL" if verdict == "FAIL" else "PASS" if verdict == "PASS" else "UNKNOWN"
    return reason or verdict, limit, decided


def _build_verdict(artefact: Path) -> str | None:
    """The verdict in the parity.json of the build beside this file; None where there is none."""
    try:
        rows = artifacts.read(artefact.parent / "parity.json", ParityFile)["rows"]
    except UserError:
        return None
    verdicts = [row["verdict"] for row in rows if row["artifact"] == artefact.name]
    return verdicts[0] if verdicts and verdicts[0] != "skipped" else None
