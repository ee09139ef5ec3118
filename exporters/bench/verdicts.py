"""Paired comparisons of `--against` and `--self-test`: the pairs, their verdict lines, the noise floor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from exporters.bench import compare, latency
from exporters.bench.measure import Measurement, Subject
from exporters.bench.subjects import default_target, subjects_of
from exporters.open import RUNTIMES
from pipeline.core.errors import UserError


def with_baselines(
    args: argparse.Namespace, subjects: Sequence[Subject]
) -> list[tuple[Subject, Subject]]:
    """Every subject with its baseline of `--against`, or with itself for `--self-test`.

    Raises UserError: a target on the GPU, a baseline that is missing or that its target does not read.
    """
    for subject in subjects:
        if RUNTIMES[subject.target.runtime].needs_gpu:
            raise UserError(
                f"{subject.target.name}: runs on a GPU, but verdicts are on CPU time; leave --against out"
            )
    return [(s, s if args.self_test else _baseline(s, args)) for s in subjects]


def baseline_file(model: Path, args: argparse.Namespace) -> Path:
    """The file of `--against`, or the one of the model's name in its folder."""
    against: Path = args.against
    return against / model.name if against.is_dir() else against


def _baseline(candidate: Subject, args: argparse.Namespace) -> Subject:
    """The candidate's baseline in the candidate's target."""
    path = args.baselines[candidate.artefact.name]
    names = [args.against_target or candidate.target.name]
    if not args.against_target and path.is_file() and not candidate.target.reads(path):
        names = [default_target(path)]
    (subject,) = subjects_of([path], names, [candidate.threads], [candidate.batch])
    return subject


def run_comparisons(
    args: argparse.Namespace, subjects: Sequence[Subject]
) -> tuple[Any, list[Measurement]]:
    """(The verdicts of all pairs for the JSON, their measurements in the order of the rows)."""
    comparisons, results = [], []
    for candidate, baseline in with_baselines(args, subjects):
        comparison, both = compare.compare_artefacts(
            candidate, baseline, args.seed, args.reference, args.allow
        )
        comparisons.append(comparison)
        results += both
    verdict = latency.worst_verdict(c["verdict"] for c in comparisons)
    return {"verdict": verdict, "comparisons": comparisons}, results


def verdict_line(comparison: dict[str, Any]) -> str:
    """The verdict of a comparison with its reasons, in one line."""
    failed = [_check(c) for c in comparison["gates"] if c["verdict"] in ("FAIL", "ALLOWED")]
    reason = comparison["reason"]
    reasons = "; ".join([reason] if reason else [*failed, _time(comparison)])
    where = f"{comparison['model']} on {comparison['target']}, {comparison['threads']} threads"
    if (batch := comparison.get("batch", 1)) != 1:
        where += f", batch {batch}"
    return f"{comparison['verdict']}: {reasons} [{where}]"


def _check(row: dict[str, Any]) -> str:
    line = f"{row['name']}: {row['candidate']}, baseline {row['baseline']}, limit {row['limit']}"
    return f"{line} (allowed)" if row["verdict"] == "ALLOWED" else line


def _time(comparison: dict[str, Any]) -> str:
    ratio, spread = comparison["ratio"], comparison["process_spread"]
    return (
        f"CPU p50 {ratio['median']:.3f} times the baseline's, 95 % interval "
        f"{ratio['ci_low']:.3f} to {ratio['ci_high']:.3f}, tolerated 1 + {ratio['tol']:g}; "
        f"{comparison['processes']} processes a side (apart by {spread['candidate']:.1%} and "
        f"{spread['baseline']:.1%}), {comparison['rounds']} rounds"
    )


def noise_floor(comparisons: Sequence[dict[str, Any]]) -> str:
    """The result of a self-test: the smallest change of CPU time this machine can measure now."""
    ratios = [c["ratio"] for c in comparisons if c["ratio"]]
    floor = max(max(ratio["ci_high"] - 1, 1 - ratio["ci_low"]) for ratio in ratios)
    return (
        f"noise floor of this machine now: changes of CPU time below {floor:.1%} are not measurable"
    )
