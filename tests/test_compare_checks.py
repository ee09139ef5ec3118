"""Each hard gate refuses what it is there for, lets less through, and says when it does not know."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exporters.artifact import counts
from exporters.bench import checks
from exporters.bench.checks import Side
from tests import artefacts

FIGURES = counts.ModelCounts(
    opset=18, operators={"Conv": 10, "Relu": 9, "QuantizeLinear": 4, "DequantizeLinear": 8}
)
LOGITS = np.random.default_rng(0).standard_normal((16, 10)).astype(np.float32)


@pytest.fixture
def side(tmp_path: Path) -> Side:
    """An int8 artefact of 1 MB with everything known."""
    artefact = tmp_path / "head" / "student.onnx"
    artefact.parent.mkdir()
    artefact.write_bytes(bytes(1_000_000))
    return Side(artefact, "int8", 1000, 50_000, FIGURES, {"weights_sha256": "a"}, LOGITS)


def beside(side: Side, size: int) -> Path:
    artefact = side.artefact.parent.parent / "other.onnx"
    artefact.write_bytes(bytes(size))
    return artefact


def verdicts(candidate: Side, baseline: Side, *allowed: str) -> dict[str, str]:
    return {r["name"]: r["verdict"] for r in checks.compare_checks(candidate, baseline, allowed)}


def operators(**changes: int) -> counts.ModelCounts:
    assert FIGURES.operators
    return replace(FIGURES, operators={**FIGURES.operators, **changes})


def test_a_file_passes_every_gate_beside_itself(side: Side) -> None:
    assert verdicts(side, side) == dict.fromkeys(checks.CHECKS, "PASS")


@pytest.mark.parametrize(
    ("change", "broken"),
    [
        ({"precision": "fp32"}, {"precision"}),
        ({"counts": replace(FIGURES, opset=19)}, {"opset"}),
        ({"counts": operators(Sigmoid=1, Relu=8)}, {"operators"}),
        ({"counts": operators(Relu=10)}, {"nodes"}),
        ({"counts": operators(QuantizeLinear=3)}, {"qdq"}),
        ({"params": 1011}, {"params"}),
        ({"macs": 50_501}, {"macs"}),
        ({"logits": LOGITS[::-1]}, {"parity"}),
        ({"logits": LOGITS * np.float32(np.nan)}, {"parity"}),
    ],
)
def test_a_candidate_that_does_more_fails_that_gate_alone_unless_allowed(
    side: Side, change: dict[str, Any], broken: set[str]
) -> None:
    candidate = replace(side, **change)
    found = verdicts(candidate, side)
    assert {name for name, verdict in found.items() if verdict == "FAIL"} == broken
    allowed = verdicts(candidate, side, *broken)
    assert "FAIL" not in allowed.values() and {allowed[name] for name in broken} == {"ALLOWED"}


@pytest.mark.parametrize(
    "change",
    [
        {"counts": operators(Relu=1)},
        {"params": 10},
        {"params": 1010},  # within the slack of 1 %
        {"macs": 1},
        {"logits": LOGITS + np.float32(1e-3)},
    ],
)
def test_less_is_always_good_and_a_little_more_tolerated(
    side: Side, change: dict[str, Any]
) -> None:
    assert "FAIL" not in verdicts(replace(side, **change), side).values()


@pytest.mark.parametrize(("size", "verdict"), [(1_014_096, "PASS"), (1_014_097, "FAIL")])
def test_bytes_may_grow_by_one_percent_and_the_notes(side: Side, size: int, verdict: str) -> None:
    assert verdicts(replace(side, artefact=beside(side, size)), side)["bytes"] == verdict


def test_what_one_side_does_not_tell_is_unknown_and_never_fails(side: Side) -> None:
    blank = Side(
        side.artefact.with_name("gone.plan"), None, None, None, counts.ModelCounts(), {}, None
    )
    for pair in ((blank, side), (side, blank), (blank, blank)):
        assert set(verdicts(*pair).values()) == {"UNKNOWN"}


def test_a_gate_shows_what_was_what_is_and_what_may_be(side: Side) -> None:
    other = replace(side, macs=60_000, counts=operators(Sigmoid=2))
    rows = {r["name"]: r for r in checks.compare_checks(other, side)}
    assert rows["macs"] == {
        "name": "macs",
        "baseline": 50_000,
        "candidate": 60_000,
        "limit": 50_500,
        "verdict": "FAIL",
    }
    told = [rows["operators"][key] for key in ("baseline", "candidate", "limit")]
    assert told == ["4 types", "5 types, new: Sigmoid 2", "no new type"]


@pytest.mark.parametrize(
    ("built", "verdict"),
    [("PASS", "PASS"), ("FAIL", "FAIL"), ("skipped", "UNKNOWN"), (None, "UNKNOWN")],
)
def test_other_weights_are_judged_by_the_parity_of_their_build(
    side: Side, built: str | None, verdict: str
) -> None:
    other = replace(side, metadata={"weights_sha256": "b"}, logits=LOGITS[::-1])
    if built:
        content = artefacts.parity(side.artefact.name, built)
        (side.artefact.parent / "parity.json").write_text(json.dumps(content))
    baseline = replace(side, artefact=beside(side, 10**6))
    assert verdicts(other, baseline)["parity"] == verdict
