"""edge.json: one run in one file, as the stage report writes it and reads it back from other machines and runs."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.core.errors import nearest
from pipeline.core.formats import (
    R12,
    Artefact,
    OtherParity,
    ParityVerdict,
    PassedParity,
    Training,
    ValFigures,
)
from pipeline.core.validation import (
    Count,
    Format,
    Fraction,
    Milliseconds,
    Positive,
    SignedFraction,
    Text,
    key,
    optional,
    schema_key,
)
from pipeline.report.budgets import BUDGET_NAME
from pipeline.report.formats.accuracy import Model, Points
from pipeline.report.formats.bench import Interval, Verdict
from pipeline.report.formats.latency import LatencyRow, Measured, Skipped
from pipeline.report.formats.quantize import Floating, Int8Row, Layer

Bound = Annotated[float, Field(ge=-100, le=1e15)]


class EdgeSelection(Format):
    """Why a method is exported."""

    split: Literal["val"] = key("The images that decided.")
    methods: dict[str, ValFigures] = key("Method to its figures.", min_length=1)
    reason: Text = key("Why this one, a sentence.")


class FamilyRow(Format):
    """One of several students by one method."""

    student: Text = key("Its name in distill.students; `student`: distill.student.")
    method: Text = key("How it was trained.")
    top1: Fraction = key("Clean top-1 on test, 0..1.")
    top1_ci: Annotated[list[Fraction], Field(min_length=2, max_length=2)] = key(
        "Its Wilson 95 % interval."
    )
    noisy: Fraction = key("Noisy top-1 on test, 0..1.")
    params: Positive = key("Parameters.")
    p50_ms: Milliseconds | None = key("Latency of the untrained network, ms; null: not measured.")
    p50_ci: Annotated[list[Milliseconds], Field(min_length=2, max_length=2)] | None = key(
        "Bootstrap 95 % interval of it; or null."
    )
    selected: bool = key("Whether val chose this method for this student.")
    exported: bool = key("Whether this is the exported student.")
    over_budget: list[str] = key("The budgets the student does not keep, in words.")
    front: bool = key("Whether no faster student is as accurate, selected methods compared.")


class Family(Format):
    """Every student of a run that has several."""

    target: Text | None = key("Where they were measured; null: nowhere.")
    rows: list[FamilyRow] = key("A student by a method each.", min_length=1)


class EdgeModel(Model):
    """A model of accuracy.json, compared with the baselines."""

    points: dict[str, Points] = key("Baseline to clean top-1 less that of the baseline, points.")


class _EdgeRow(Format):
    """What the build says of the artefact of a row."""

    parity: ParityVerdict | None = key("Verdict of the artefact's parity; null without such a row.")
    top1_drop: SignedFraction | None = key("Top-1 lost to int8, a fraction -1..1; null elsewhere.")
    samples_ms: list[Milliseconds] = optional(
        "Only in older files: at most 61 wall times, ms, sorted, evenly spaced in rank.",
        max_length=61,
    )


class MeasuredEdge(_EdgeRow, Measured):
    """A measured row with what the build says of its artefact."""


class SkippedEdge(_EdgeRow, Skipped):
    """A row that was not measured."""


EdgeRow = Annotated[MeasuredEdge | SkippedEdge, Field(discriminator="status")]


class Target(Format):
    """Student and teacher in one target, at the fewest threads and the smallest batch."""

    target: Text = key("Requested runtime and precision.")
    threads: Positive = key("Threads of both rows.")
    student: EdgeRow = key("The exported student.")
    teacher: EdgeRow = key("Its teacher.")
    speedup: Annotated[float, Field(gt=0, le=1e15)] | None = key(
        "p50 of the teacher over that of the student, a ratio; null unless both were measured."
    )
    more_threads: list[LatencyRow] = key("The measured rows at more threads or a larger batch.")


class PassedEdgeParity(PassedParity):
    """A row of parity.json that passed, with its target."""

    target: Text


class OtherEdgeParity(OtherParity):
    """Another row of parity.json, with its target."""

    target: Text


class EdgeInterval(Interval):
    """A ratio of times with its bootstrap 95 % interval."""

    tol: Fraction = optional("Slow-down tolerated, a fraction of the baseline's time, 0..1.")
    verdict: Verdict = optional("Of the ratio alone, gates left out; of a comparison only.")


class ComparedInterval(EdgeInterval):
    """The ratio of a comparison."""

    tol: Fraction


class EdgePair(Format):
    """Student time over teacher time in one target."""

    target: Text = key("Requested runtime and precision.")
    threads: Positive = key("Threads of both.")
    batch: Positive = optional("Images a call of both.")
    candidate: Literal["student"] = optional("Whose time is divided.")
    baseline: Literal["teacher"] = optional("By whose time.")
    clock: Text = optional("Which time: cpu, of the process; engine, of the GPU.")
    ratio: EdgeInterval | None = key("Below 1 the student is faster.")


class EdgeGate(Format):
    """A property of a model beside that of its baseline."""

    name: Text = key("The property.")
    baseline: Any = key("Its figure or text of the baseline.")
    candidate: Any = key("Its figure or text of the model.")
    limit: Any = key("The bound; null where the two must be equal.")
    verdict: Text = key("PASS, FAIL, ALLOWED: different, and accepted by the user, UNKNOWN.")


class EdgeComparison(Format):
    """A model against its baseline in one target, as the bench judged it."""

    model: Text = key("Name of the model's file.")
    target: Text = key("Where both ran.")
    threads: Positive = key("Threads of both.")
    batch: Positive = optional("Images a call of both; absent in older files.")
    verdict: Text = key("PASS, FAIL, INCONCLUSIVE; another word where nothing could be compared.")
    ratio: ComparedInterval | None = key("CPU time over the baseline's; null where not measured.")
    gates: list[EdgeGate] = key("The gates free of noise.")
    reason: Text | None = optional("Which side stopped and why; null where both ran to the end.")
    rounds: Count = optional("Rounds compared.")
    processes: Positive = optional("Processes a side.")
    process_spread: dict[str, Any] | None = optional("How far the processes of a side lie apart.")


class Budget(Format):
    """One budget and whether the exported student keeps it."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"verdict": {"const": "NOT MEASURED"}}},
            "then": {"properties": {"value": {"type": "null"}}},
            "else": {"properties": {"value": {"type": "number"}}},
            "allOf": [
                {
                    "if": {"properties": {"name": {"const": "gain_min"}}},
                    "then": {"properties": {"limit": {"maximum": 100}}},
                    "else": {"properties": {"limit": {"minimum": 0}, "value": {"minimum": 0}}},
                },
                {
                    "if": {"properties": {"name": {"pattern": "wall_ms_max$"}}},
                    "then": {"properties": {"limit": {"minimum": 1e-9}}},
                },
            ],
        }
    )
    name: Annotated[str, Field(pattern=BUDGET_NAME)] = key(
        "top1_min, gain_min, params_max, wall_ms_max or size_mb_max; the last two may name a target first."
    )
    what: Text = key("The quantity and its unit, in words.")
    limit: Bound = key("The bound, in the unit of the name: a fraction, points, a count, ms or MB.")
    value: Bound | None = key("What was measured, in the same unit; null where nothing was.")
    verdict: Literal["PASS", "FAIL", "INCONCLUSIVE", "NOT MEASURED"] = key(
        "INCONCLUSIVE: only noise is above the limit."
    )

    @model_validator(mode="after")
    def _check_value(self) -> Budget:
        if (self.value is None) != (self.verdict == "NOT MEASURED"):
            raise ValueError(f"value: got {self.value}; expected one that goes with {self.verdict}")
        least = 1e-9 if self.name.endswith("wall_ms_max") else 0
        if self.name == "gain_min":
            if self.limit > 100:
                raise ValueError(f"limit: got {self.limit}; expected 100 points or less")
        elif self.limit < least or (self.value or 0) < 0:
            raise ValueError(
                f"limit, value: got {self.limit}, {self.value}; expected {least} or more"
            )
        return self


class Outcome(Format):
    """The verdict of a run."""

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"properties": {"status": {"const": "FAIL"}}},
            "then": {"properties": {"failures": {"minItems": 1}}},
            "else": {"properties": {"failures": {"maxItems": 0}}},
        }
    )
    status: Literal["PASS", "FAIL", "NO GAIN", "INCONCLUSIVE", "NOT JUDGED"] = key(
        "FAIL: the stage ends with exit 3; NO GAIN: nothing failed, but distillation gained nothing; "
        "INCONCLUSIVE: nothing failed, but a comparison with a baseline decided nothing; NOT JUDGED: "
        "there was no parity row, budget or baseline."
    )
    no_gain: list[str] = optional("Why distillation gained nothing; absent in older files.")
    failures: list[str] = key("Each gate that failed, in words.")
    notes: list[str] = key("What a reader must know although it fails nothing.")

    @model_validator(mode="after")
    def _check_failures(self) -> Outcome:
        if bool(self.failures) != (self.status == "FAIL"):
            raise ValueError(
                f"failures: got {len(self.failures)}; expected some with FAIL, none with another status"
            )
        return self


class EdgeInt8(Format):
    """What int8 costs the exported student, by calibration and after its fine-tuning."""

    steps: Positive = key("Steps of the fine-tuning.")
    method: Text = key("The method whose student was fine-tuned.")
    images: Positive = key("Images of val behind the figures.")
    fp32_top1: Fraction = key("Top-1 of the distilled student in float32.")
    rows: list[Int8Row] = key("A row for each target and origin of the ranges.")
    layers: list[Layer] = key("The layers of the student in graph order.")
    floating: Floating = optional("Layers left in float. Absent in older files.")


class Edge(Artefact):
    """Written by the stage report: one run in one file, with its verdicts.

    edge.md and index.html are drawn from it; `python -m stages.report --merge` joins those of several machines.
    """

    schema_: Literal["cakd.edge/1"] = schema_key()
    title: Text = key("Heading of the report.")
    shipped: Text = key("The method whose student is exported.")
    student: Text = optional("Which of several students is exported.")
    family: Family = optional("Every student, where the run has several.")
    selection: EdgeSelection = optional(
        "From selection.json: why this method is exported. Absent in older files."
    )
    teacher_r12: R12 | None = optional("Of the teacher of the students. Absent in older files.")
    split: Literal["train", "val"] | None = optional("The images judged; absent: test.")
    noise: list[str] = key("The kinds of noise behind `noisy`.")
    models: dict[str, EdgeModel] = key("The models of accuracy.json, compared with the baselines.")
    targets: list[Target] = key("One entry a target of bench.enabled.")
    training: dict[str, Training] = key("The methods of train_perf.json.")
    parity: list[Annotated[PassedEdgeParity | OtherEdgeParity, Field(discriminator="verdict")]] = (
        key("The parity rows of every target.")
    )
    budgets: list[Budget] = key("The budgets of report.budgets, judged.")
    pairs: list[EdgePair] = optional("Student over teacher by target. From cakd.bench/2 on.")
    comparisons: list[EdgeComparison] = optional(
        "A model against its baseline, of a bench JSON after --against; empty in a summary of the stage."
    )
    deadline_ms: Milliseconds = optional("report.deadline_ms, where it is set.")
    int8: EdgeInt8 = optional("From quantize.json; absent with quantize.steps 0.")
    verdict: Outcome = key("The verdict of the run.")

    @model_validator(mode="after")
    def _check_shipped(self) -> Edge:
        if self.shipped not in self.models:
            raise ValueError(f"shipped: got {self.shipped!r}; {nearest(self.shipped, self.models)}")
        return self
