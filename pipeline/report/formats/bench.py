"""reports/bench/<target>.json, and what a bundle's runner prints of a bench on its device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.core.formats import Artefact
from pipeline.core.validation import (
    Count,
    Format,
    Fraction,
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
from pipeline.report.formats.latency import (
    Conditions,
    CpuTime,
    Measured,
    NoCpuTime,
    NoWall,
    Percentiles,
    Skipped,
    Wall,
)

Whole = Annotated[int, Field(ge=0, le=2**53 - 1)]
Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
Ends = Annotated[list[Milliseconds], Field(min_length=2, max_length=2)]
GateName = Literal[
    "precision", "opset", "operators", "nodes", "qdq", "params", "macs", "bytes", "parity"
]


class BenchWall(Wall):
    """Wall times of a measured row with the interval of the median."""

    p50_ci: Ends | None = key("Bootstrap 95 % interval of the p50 over blocks, ms; or null.")


class NoBenchWall(NoWall):
    """The same of a skipped row."""

    p50_ci: Ends | None = key("Bootstrap 95 % interval of the p50 over blocks, ms; or null.")


class EngineTimes(Percentiles):
    """The GPU's own times of the calls by CUDA events, copies left out, ms."""

    p50: Size
    min: Size
    n: Positive


class BenchConditions(Conditions):
    """The moment of the measurement, power and limits too."""

    cpu_quota: Size | None = key("Cores that the cgroup may use; null without a quota.")
    memory_limit_gb: Size | None = key("Memory that the cgroup may use, in 1e9 bytes; or null.")
    power_mode: Text | None = key("Power mode of a Jetson, as nvpmodel names it.")
    power_w: Size | None = key("Power of a Jetson's board, W.")
    celsius: float | None = key("Temperature of a Jetson's GPU.")


class _BenchRow(Format):
    """What every row of a bench has beside the keys of a latency row."""

    artefact: Text
    target: Text
    params: Whole | None = key("Values of the weights in the file; null where it does not say.")
    macs: Whole | None = key("Multiply-accumulates of one image; null where the file does not say.")
    engine_ms: EngineTimes | None = key("The GPU's own time of a call by CUDA events, or null.")


class MeasuredBench(_BenchRow, Measured):
    """A measured row of a bench."""

    reason: None
    wall_ms: BenchWall
    conditions: BenchConditions = optional("The moment of the measurement.")
    samples_ms: list[Milliseconds] = optional("Wall times, ms. In older files.", min_length=1)


class SkippedBench(_BenchRow, Skipped):
    """A row of a bench that was not measured: every key is there."""

    runtime: Text | None
    threads: Positive
    wall_ms: NoBenchWall
    cpu_ms: NoCpuTime
    load_ms: Size | None
    first_ms: Size | None
    rss_mb: Size | None
    conditions: BenchConditions = optional("The moment of the measurement.")


BenchRow = Annotated[MeasuredBench | SkippedBench, Field(discriminator="status")]


class Interval(Format):
    """A ratio of two times, drawn from the rounds."""

    median: Size = key("Median of the rounds, a ratio.")
    ci_low: Size = key("Lower end of the bootstrap 95 % interval, a ratio.")
    ci_high: Size = key("Upper end, a ratio.")


class Ratio(Interval):
    """The ratio of a comparison."""

    tol: Fraction = key("Slow-down tolerated, a fraction of the baseline's time, 0..1.")
    verdict: Verdict = optional("Of the ratio alone, gates left out.")


class Pair(Format):
    """Student over teacher in one target."""

    model_config = ConfigDict(extra="forbid")
    target: Text = key("The target both ran in.")
    threads: Positive = key("Threads of both.")
    batch: Positive = key("Images a call of both.")
    candidate: Literal["student"] = key("Whose time is divided.")
    baseline: Literal["teacher"] = key("By whose time.")
    clock: Literal["cpu", "engine"] = key("CPU time of the process, or the GPU's by CUDA events.")
    ratio: Interval = key("Time of the student over that of the teacher.")


class Gate(Format):
    """One property of a model beside that of its baseline."""

    model_config = ConfigDict(extra="forbid")
    name: GateName = key("The property.")
    baseline: int | str | None = key("Of the baseline; null where the file does not say.")
    candidate: int | str | None = key("Of the model.")
    limit: int | str | None = key("The most it may be, or how it must compare.")
    verdict: Literal["PASS", "FAIL", "ALLOWED", "UNKNOWN"] = key(
        "ALLOWED: over the limit, and named by --allow; UNKNOWN: one of the files does not say."
    )


class Spread(Format):
    """How far the processes of each side lie apart: slowest over fastest CPU p50, less 1."""

    model_config = ConfigDict(extra="forbid")
    candidate: Size | None = key("Of the model, a ratio less 1.")
    baseline: Size | None = key("Of the baseline, a ratio less 1.")


class Comparison(Format):
    """One model beside its baseline."""

    model_config = ConfigDict(extra="forbid")
    model: Text = key("Name of the model's file.")
    target: Text = key("Where the model ran.")
    threads: Positive = key("Threads of both sides.")
    batch: Positive = optional("Images a call of both sides; absent in older files: 1 or its own.")
    verdict: Verdict = key("Of this comparison, gates included.")
    reason: Text | None = key("Which side could not run, and why; null where both did.")
    ratio: Ratio | None = key("CPU time over the baseline's, paired by round; or null.")
    gates: list[Gate] = key("Free of noise; empty where the two run in different targets.")
    rounds: Count = key("Rounds compared; 0 where one side could not run.")
    processes: Positive = key("Processes a side.")
    process_spread: Spread = key("How far the processes of one side lie apart.")


class Bench(Artefact):
    """Written by the stage bench, one file a target, and by `python -m exporters.bench --json F` of any models.

    With paired verdicts after --against or --self-test. Every call is beside it in an .npz of the same name.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "dependentRequired": {"verdict": ["comparisons"], "comparisons": ["verdict"]}
        }
    )
    schema_: Literal["cakd.bench/2"] = schema_key()
    target: Text = key("The target of all rows; from the command line all targets, with commas.")
    p50_ms: dict[str, Size] = optional(
        "Median wall time of each measured row, ms, by model and thread count (student_1t). Of the stage only."
    )
    rows: list[BenchRow] = key(
        "A model at a thread count and batch each; after --against the model, then its baseline.",
        min_length=1,
    )
    pairs: list[Pair] = optional("Student over teacher at the fewest threads. Of the stage only.")
    verdict: Verdict = optional("The worst of the comparisons, after --against or --self-test.")
    comparisons: list[Comparison] = optional(
        "A model in a target at a thread count beside its baseline, each.", min_length=1
    )

    @model_validator(mode="after")
    def _check_verdict(self) -> Bench:
        if len(got := {"verdict", "comparisons"} & self.model_fields_set) == 1:
            raise ValueError(f"got {got.pop()} alone; expected verdict and comparisons or neither")
        return self


class Bundle(Format):
    """A bundle that ran."""

    name: Text = key("Its name.")
    manifest_sha256: Sha256 = key("SHA-256 of its manifest.")


class WarmUp(Format):
    """The calls before those that were timed."""

    seconds: Size = key("Their time, s.")
    stable: bool = key("Whether three block medians agreed in the end.")


class BundleMachine(Format):
    """The device a bundle ran on."""

    board: Text | None = key("Name of a single-board computer, else null.")
    system: Text = key("Operating system: Linux, Darwin.")
    arch: Text = key("Instruction set architecture: x86_64, aarch64.")
    cores: Positive = key("Cores left by affinity and the cgroup's CPU quota.")
    load_1m: Size | None = key("Load average over a minute, in runnable tasks; or null.")
    python: Text = key("Version of Python.")
    numpy: Text = key("Version of NumPy.")


class BundleBench(Format):
    """Printed by the runner of an edge bundle with --bench --json: the latency of one model on the device.

    `python -m stages.report --merge` shows it beside other machines.
    """

    schema_: Literal["cakd.bundle-bench/1"] = schema_key()
    bundle: Bundle = key("The bundle that ran.")
    model: Text = key("Name of the file that ran.")
    runtime: Annotated[str, Field(pattern=r"^(onnxruntime|openvino|tensorrt) \S+$")] = key(
        "Name and version of what ran it."
    )
    precision: Precision = key("The requested precision.")
    threads: Positive | None = key("Threads the runtime may use; null on a GPU.")
    load_ms: Size = key("Opening the model, the building of an engine not counted, ms.")
    build_s: Size | None = key("Building the engine, s; null where there is none to build.")
    computes_in: Text = key("What the runtime says it computed in.")
    batch: Positive = key("Images a call.")
    first_ms: Size = key("The first call, ms.")
    wall_ms: Wall = key("Wall time of a call, copies in and out included.")
    cpu_ms: CpuTime = key("CPU time of the process a call.")
    cpu_share: Size = key("CPU time over wall time, a ratio.")
    warm_up: WarmUp = key("The calls before those that were timed.")
    flags: list[str] = key("Why the row is noisy; empty for a quiet one.")
    machine: BundleMachine = key("The device.")
