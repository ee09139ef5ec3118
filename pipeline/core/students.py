"""Several students: their latencies as JSON, here or on a device, and where each has its files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.formats import Artefact, Machine, Provenance
from pipeline.core.validation import (
    Count,
    Format,
    Milliseconds,
    Positive,
    Precision,
    Sha256,
    Size,
    Text,
    key,
    optional,
    schema_key,
)

MAIN = "student"  # how distill.student is named beside those of distill.students
BEST = "best"  # a value of export.method and export.student: chosen on val

Percent = Annotated[float, Field(ge=0, le=100)]
Ends = Annotated[list[Milliseconds], Field(min_length=2, max_length=2)]


class CandidateWall(Format):
    """Wall times of the calls, ms; of a network that was not measured null, and n 0."""

    p50: Milliseconds | None = key("Median, ms.")
    p99: Milliseconds | None = key("99th percentile, ms; null below 1,000 calls.")
    p50_ci: Ends | None = key("Bootstrap 95 % interval of the p50 over blocks, ms; or null.")
    n: Count = key("Calls timed.")


class NetworkRow(Format):
    """An untrained CNN: what is known of it, and its latency or the reason why there is none."""

    name: Text = key("As it was asked for: timm's name, with further arguments after a colon.")
    model: Text = key("Its name in timm.")
    kwargs: dict[str, Any] = key("Further arguments of timm.create_model.")
    params: Count | None = key("Parameters of its checkpoint.")
    macs: Count | None = key("Multiply-accumulates of one image.")
    tap: Text | None = key("Module and grid where CAKD would read it; null where it cannot.")
    no_tap: Text | None = key("Why CAKD cannot read it; null where it can.")
    size_mb: Size | None = key("The artefact with its weights, in 1e6 bytes.")
    status: Literal["measured", "skipped"] = key("Whether there are figures.")
    reason: Text | None = key("Why it was not measured.")
    precision: Precision | None = key("What the runtime says it computed in.")
    wall_ms: CandidateWall = key("Wall time of a call of one image.")
    flags: list[str] = key("NOISY and why; empty for a quiet row.")


class CandidateRow(NetworkRow):
    """The same after the ranking."""

    rss_mb: Size | None = key("Memory of the process after the warm-up, in 1e6 bytes.")
    imagenet_top1: Percent | None = key("From --results; null where it does not know.")
    fits: Literal["yes", "no", "level"] | None = key(
        "Whether the p50 keeps the budget; level: within the noise of it; null without a budget."
    )
    front: Literal["front", "level"] | None = key(
        "No faster one has as much capacity; level: none that is faster by more than the noise."
    )


class Candidates(Artefact):
    """Written by exporters.candidates: every candidate with its latency, fastest first.

    Capacity is the ImageNet top-1 where every row has one, else multiply-accumulates.
    """

    schema_: Literal["cakd.candidates/1"] = schema_key()
    target: Text = key("Requested runtime and precision; of a device's figures what it ran.")
    threads: Positive = key("Threads the runtime may use.")
    image_size: Positive = key("Side of the square input, pixels.")
    budget_ms: Size | None = key("The p50 that was asked for; or null.")
    rows: list[CandidateRow] = key("The candidates.", min_length=1)


class PackName(Format):
    """The pack that was measured."""

    name: Text = key("Its folder's name when it was made.")
    manifest_sha256: Sha256 = key("SHA-256 of its manifest.json.")


class PackBench(Format):
    """Printed on a device by `python -m bundle.run --bench-all --json`, read by exporters.candidates --from."""

    schema_: Literal["cakd.pack-bench/1"] = schema_key()
    pack: PackName = key("The pack that was measured.")
    runtime: Text = key("Name and version of what ran.")
    precision: Precision = key("Of the pack.")
    image_size: Positive = key("Side of the square input, pixels.")
    threads: Positive = key("Threads the runtime may use.")
    rows: list[NetworkRow] = key("The networks, in the order of the pack.", min_length=1)
    machine: dict[str, Any] = key("The device.")


class Students(Format):
    """Written by the stage students: every student of the run, untrained, on the targets that decide.

    Without distill.students there is nothing to compare, no target and no machine: the same file everywhere.
    """

    schema_: Literal["cakd.students/1"] = schema_key()
    targets: dict[str, list[NetworkRow]] = key(
        "Target to its rows, one a student, by the names of distill.students; `student` is distill.student."
    )
    machine: Machine = optional("Where they were measured.")
    provenance: Provenance = optional("The parameters and versions they were measured with.")


def folder_of(folder: Path, student: str) -> Path:
    """The folder of a student's methods: `folder` for MAIN, else the one of its name in it."""
    return folder if student == MAIN else folder / student
