"""Latency of all candidates in interleaved rounds; each is kept, so that a killed measurement goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.artifact import counts
from exporters.artifact.session import Target
from exporters.bench.conditions import conditions
from exporters.bench.latency import Block
from exporters.bench.measure import (
    NO_TIMES,
    Measurement,
    Subject,
    finish_measurement,
    run_rounds,
    warmed_runners,
)
from exporters.candidates.untrained import Untrained
from exporters.open import RUNTIMES
from pipeline.core import artifacts, progress
from pipeline.core.machine import machine

SCHEMA = "cakd.round/1"
NOT_MEASURED: dict[str, Any] = {
    **NO_TIMES,
    "load_ms": None,
    "first_ms": None,
    "rss_mb": None,
    "flags": [],
}


@dataclass(frozen=True)
class Protocol:
    """Rounds, and seconds of a block; as `bench:` has them."""

    rounds: int
    seconds: float
    seed: int = 0


def measure(subjects: Sequence[Subject], protocol: Protocol, work: Path) -> list[Measurement]:
    """Measure all subjects in shuffled rounds, and forget the kept rounds when all are done.

    A measurement that goes on after a kill starts its processes anew and warms them up.
    """
    decides = [[s.model, s.target.name, s.threads, artifacts.sha256(s.artefact)] for s in subjects]
    name = artifacts.digest([decides, vars(protocol), machine()])[:12]
    folder = work / f"rounds-{name}"
    before = conditions()
    with warmed_runners(subjects, None) as runners:
        done = 0
        while (path := folder / f"{done:04d}.json").is_file():
            for runner, block in zip(
                runners, artifacts.read_json(path, SCHEMA)["blocks"], strict=True
            ):
                if block is not None:
                    runner.blocks.append(Block(**block))
                    runner.watts.append(None)  # the power of a kept block is not kept
            done += 1
        with progress.Progress("rounds", protocol.rounds) as bar:
            for number in range(done, protocol.rounds):
                had = [len(runner.blocks) for runner in runners]
                run_rounds(runners, 1, protocol.seconds, protocol.seed + number)
                new: list[Any] = [
                    vars(r.blocks[-1]) if len(r.blocks) > n else None
                    for r, n in zip(runners, had, strict=True)
                ]
                folder.mkdir(parents=True, exist_ok=True)
                artifacts.write_json(
                    folder / f"{number:04d}.json", {"schema": SCHEMA, "blocks": new}
                )
                bar(number + 1)
        after = conditions()
        results = [finish_measurement([runner], before, after) for runner in runners]
    shutil.rmtree(folder, ignore_errors=True)
    return results


def measured_rows(
    built: Sequence[tuple[Untrained, Target]], threads: int, protocol: Protocol, work: Path
) -> list[dict[str, Any]]:
    """A row for each network in its target: what is known of it, and its times or why there are none."""
    running = [(one, target) for one, target in built if one.artefact is not None]
    subjects = [_subject(one, target, threads) for one, target in running]
    results = iter(measure(subjects, protocol, work) if subjects else [])
    return [_row(one, next(results).row if one.artefact is not None else None) for one, _ in built]


def _subject(one: Untrained, target: Target, threads: int) -> Subject:
    """What is measured of one network."""
    assert one.artefact is not None
    obstacle = RUNTIMES[target.runtime].obstacle(one.artefact)
    return Subject(one.candidate.name, one.artefact, target, threads, obstacle)


def _row(one: Untrained, measured: dict[str, Any] | None) -> dict[str, Any]:
    size = counts.size_bytes(one.artefact) if one.artefact else None
    times = measured or NOT_MEASURED
    return {
        **one.facts(),
        "size_mb": size and size / 1e6,
        "status": measured["status"] if measured else "skipped",
        "reason": measured["reason"] if measured else one.reason,
        "precision": measured["precision_effective"] if measured else None,
        **{
            key: times[key]
            for key in ("wall_ms", "cpu_ms", "load_ms", "first_ms", "rss_mb", "flags")
        },
    }
