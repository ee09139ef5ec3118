"""Paired comparisons that the command line asks for: the pairs, their verdict lines, the noise floor."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from exporters.bench import compare, latency
from exporters.bench.measure import Measurement, Subject
from exporters.bench.subjects import default_target, subjects_of
from exporters.open import RUNTIMES
from pipeline.core.errors import UserError


def with_baselines(
    args: argparse.Namespace, subjects: Sequence[Subject]
) -> list[tuple[Subject, Subject]]:
    """`--against` and `--self-test`: every subject beside its baseline, or beside itself.

    Raises UserError: work that is not on the CPU, a baseline that is missing or that its target does not read.
    """
    for subject in subjects:
        if RUNTIMES[subject.target.runtime].needs_gpu:
            raise UserError(
                f"{subject.target.name} runs on a GPU: the verdict is on CPU time; compare the rows instead"
            )
    return [(s, s if args.self_test else _baseline(s, args)) for s in subjects]


def _baseline(candidate: Subject, args: argparse.Namespace) -> Subject:
    """The file of `--against`, or that of the candidate's name in its folder, where the candidate runs."""
    path = args.against / candidate.artefact.name if args.against.is_dir() else args.against
    names = [args.against_target or candidate.target.name]
    if not args.against_target and path.is_file() and not candidate.target.reads(path):
        names = [default_target(path)]
    (found,) = subjects_of([path], names, [candidate.threads], [candidate.batch])
    return found


def run_comparisons(
    args: argparse.Namespace, subjects: Sequence[Subject]
) -> tuple[Any, list[Measurement]]:
    """Every pair, one after the other: the verdicts, and what was measured in the order of the rows."""
    comparisons, found = [], []
    for candidate, baseline in with_baselines(args, subjects):
        told, both = compare.compare_artefacts(
            candidate, baseline, args.seed, args.reference, args.allow
        )
        comparisons.append(told)
        found += both
    verdict = latency.worst_verdict(told["verdict"] for told in comparisons)
    return {"verdict": verdict, "comparisons": comparisons}, found


def verdict_line(told: dict[str, Any]) -> str:
    """A comparison in words."""
    broken = [_gate(g) for g in told["gates"] if g["verdict"] in ("FAIL", "ALLOWED")]
    parts = [told["reason"]] if told["reason"] else [*broken, _time(told)]
    where = f"{told['model']} on {told['target']}, {told['threads']} threads"
    return f"{told['verdict']}: {'; '.join(parts)} [{where}]"


def _gate(row: dict[str, Any]) -> str:
    what = f"{row['name']}: {row['candidate']}, baseline {row['baseline']}, limit {row['limit']}"
    return f"{what} (allowed)" if row["verdict"] == "ALLOWED" else what


def _time(told: dict[str, Any]) -> str:
    ratio, spread = told["ratio"], told["process_spread"]
    return (
        f"CPU p50 {ratio['median']:.3f} times the baseline's, 95 % interval "
        f"{ratio['ci_low']:.3f} to {ratio['ci_high']:.3f}, tolerated 1 + {ratio['tol']:g}; "
        f"{told['processes']} processes a side (apart by {spread['candidate']:.1%} and "
        f"{spread['baseline']:.1%}), {told['rounds']} rounds"
    )


def noise_floor(comparisons: Sequence[dict[str, Any]]) -> str:
    """What a self-test says of this machine, now: the smallest change that it can tell from none."""
    ratios = [told["ratio"] for told in comparisons if told["ratio"]]
    floor = max(max(ratio["ci_high"] - 1, 1 - ratio["ci_low"]) for ratio in ratios)
    return (
        f"noise floor here and now: a change of CPU time below {floor:.1%} cannot be told from none"
    )
