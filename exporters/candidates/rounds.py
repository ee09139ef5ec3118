"""Interleaved rounds over all candidates, each finished round kept, so that a killed measurement goes on."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.bench.conditions import conditions
from exporters.bench.latency import Block
from exporters.bench.measure import (
    Measurement,
    Subject,
    finish_measurement,
    run_rounds,
    warmed_runners,
)
from pipeline.core import artifacts, progress
from pipeline.core.machine import machine

SCHEMA = "cakd.round/1"


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
                runner.blocks += [] if block is None else [Block(**block)]
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
