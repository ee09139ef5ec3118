"""A row of latencies, measured or skipped, as bench and edge reports share it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.formats import Requested
from pipeline.core.validation import (
    Count,
    Format,
    Fraction,
    Milliseconds,
    Positive,
    Precision,
    Size,
    Text,
    key,
    optional,
)


class Percentiles(Format):
    """Times of the calls of a row, ms."""

    p50: Size | None = key("Median, ms.")
    p90: Size | None = key("90th percentile, ms; null below 100 calls.")
    p99: Size | None = key("99th percentile, ms; null below 1,000 calls.")
    min: Size | None = key("The fastest call, ms.")
    n: Count = key("Calls timed.")


class Wall(Percentiles):
    """Wall times of the calls of a measured row, ms."""

    p50: Milliseconds
    min: Milliseconds
    n: Positive


class NoWall(Percentiles):
    """The same of a skipped row."""

    p50: None
    n: Literal[0]


class CpuTime(Format):
    """CPU time of the process a call, ms."""

    p50: Size = key("Median, ms.")


class NoCpuTime(Format):
    """The same of a skipped row."""

    p50: None = key("Median, ms.")


class Conditions(Format):
    """The moment of the measurement."""

    time: Annotated[str, Field(json_schema_extra={"format": "date-time"})] = key("UTC, ISO 8601.")
    kernel: Text = key("Kernel release.")
    load_1m: Size | None = key("Load average over a minute, in runnable tasks.")
    governor: Text | None = key("Frequency governor of the CPU.")
    cpu_mhz: Size | None = key("Clock of the CPU, MHz.")
    gpu_mhz: Size | None = key("Clock of the GPU's multiprocessors, MHz.")
    throttled: Annotated[int, Field(ge=0)] | None = key(
        "Periods in which the CPU quota has stopped this cgroup so far; null where it is not counted."
    )


class NodeGroup(Format):
    """The nodes of one location and precision."""

    location: Text = key("Execution provider or device: CPUExecutionProvider, CPU, GPU.")
    precision: Literal["fp32", "fp16", "bf16", "int8", "conversion", "other"] = key(
        "Of the first input; conversion: a node that only changes type or layout; other: neither "
        "floating-point nor int8, or not known."
    )
    operators: dict[str, Positive] = key("Operator or layer type to the number of its nodes.")


class Placement(Format):
    """Which operators of an artefact ran where."""

    source: Text | None = key("What the runtime was asked for; null where it does not say.")
    groups: list[NodeGroup] = key("The largest group first; empty where the runtime does not say.")
    reason: Text | None = key("Why it is not known; null where it is.")


class Energy(Format):
    """Energy of a call by a meter of the whole package or board, idle power included."""

    source: Text | None = key("The meter and what it sees; null where there is none to read.")
    watts: Size | None = key("Mean power during the blocks, W.")
    idle_watts: Size | None = key("Power while all workers are loaded and wait, W; or null.")
    joules_per_call: Size | None = key("watts times the mean wall time of a call, J.")
    reason: Text | None = key("Why there is no figure; null where there is one.")


class OverDeadline(Format):
    """The calls that took longer than `report.deadline_ms`."""

    share: Fraction = key("Of all calls of the row, a fraction 0..1.")
    ci: Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None = key(
        "Bootstrap 95 % interval over blocks; null below 5 blocks and where the share is 0 or 1."
    )


class Row(Format):
    """A model in a target at a thread count: measured with its figures, or skipped with a reason."""

    model: Text = key("student or teacher; on the command line of exporters.bench the file's name.")
    artefact: Text = optional("Name of the file that ran, or would have.")
    target: Text = optional("Requested runtime and precision: ort-fp32, ov-default, ...")
    runtime: Text | None = optional("Name and version of what ran it; null where nothing did.")
    threads: Positive = optional("Threads the runtime may use.")
    batch: Positive = key("Images a call.")
    status: Literal["measured", "skipped"] = key("Whether there are figures.")
    reason: Text | None = key("Why it was skipped; in edge.json also why it was built otherwise.")
    precision_requested: Requested | None = key(
        "What was asked for; default: the runtime's choice."
    )
    precision_effective: Precision | None = key("What the runtime says it computed in.")
    wall_ms: Percentiles = optional("Wall time of a call, copies in and out included.")
    cpu_ms: CpuTime | NoCpuTime = optional("CPU time of the process a call.")
    img_per_s: Size | None = optional("Images a second at the median wall time.")
    load_ms: Size | None = optional("Opening the artefact, the runtime's import not counted, ms.")
    first_ms: Size | None = optional("The first call, ms.")
    size_mb: Size | None = key("The artefact with its weights, in 1e6 bytes; null without a file.")
    rss_mb: Size | None = optional("Memory of the process after the warm-up, in 1e6 bytes.")
    warm_up_seconds: Size | None = optional("Time until three block medians agreed, or the limit.")
    placed_on: Placement | None = optional("Which operators ran where; null in a skipped row.")
    energy: Energy | None = optional("Energy of a call; null in a skipped row.")
    flags: list[str] = key("NOISY and why, where the machine was disturbed; empty for a quiet row.")
    conditions: Conditions = optional("The moment of the measurement.")
    over_deadline: OverDeadline = optional("In edge.json, where report.deadline_ms is set.")
    samples_ms: list[Milliseconds] = optional(
        "Wall times of calls, ms. Only in older files: every call is in the .npz beside the bench JSON."
    )


class Measured(Row):
    """A measured row."""

    runtime: Text
    threads: Positive
    status: Literal["measured"]
    precision_effective: Precision
    wall_ms: Wall
    cpu_ms: CpuTime
    load_ms: Size
    first_ms: Size
    size_mb: Size
    rss_mb: Size


class Skipped(Row):
    """A row that was not measured, with the reason."""

    status: Literal["skipped"]
    reason: Text
    wall_ms: NoWall = optional("Wall time of a call, copies in and out included.")
    cpu_ms: NoCpuTime = optional("CPU time of the process a call.")


LatencyRow = Annotated[Measured | Skipped, Field(discriminator="status")]
