"""The JSON files that more than one room reads: train/<method>.json, selection.json, build.json, parity.json.

A change here runs every stage again: what only the report reads is in pipeline/report/formats/.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.core.validation import (
    Count,
    Format,
    Fraction,
    Positive,
    Precision,
    Sha256,
    SignedFraction,
    Size,
    Text,
    key,
    optional,
    schema_key,
)

Loss = Annotated[float, Field(ge=-1e30, le=1e30)]
Requested = Literal["fp32", "fp16", "bf16", "int8", "default"]


class Provenance(Format):
    """What made the file. Holds no clock time: the same inputs give the same bytes."""

    params: dict[str, Any] | None = key("The parameters it was made with, or null.")
    inputs: dict[str, Sha256] = key("Name of each input file to the SHA-256 of its bytes.")
    versions: dict[str, str | None] = key("Packages that decide the figures, by version.")
    images: Sha256 = optional("SHA-256 of the prepared pixels, where the figures depend on them.")
    index: Sha256 = optional("SHA-256 of the prepared index: labels and splits.")


class Cores(Format):
    """Cores of a host."""

    model_config = ConfigDict(extra="forbid")
    logical: Positive = key("Logical cores the system counts.")
    usable: Positive = key("Whole cores left by affinity and the cgroup's CPU quota.")


class Gpu(Format):
    """The first NVIDIA GPU."""

    name: Text = key("Product name.")
    driver: Text = key("Driver version.")
    count: Positive = key("GPUs in this host.")


class Versions(Format):
    """Python and the runtimes by version, null where absent."""

    __pydantic_extra__: dict[str, str | None]
    python: Text = key("Version of Python.")


class Machine(Format):
    """What a figure was measured on: identity only, the same bytes on a second run."""

    cpu: Text = key("Model name; on an Arm that gives none, implementer and part.")
    isa: list[str] = key("Instruction sets that matter to the runtimes.")
    cores: Cores = key("Cores of this host.")
    memory_gb: Size | None = key("Memory in 1e9 bytes; null off Linux.")
    os: Text = key("Operating system: Linux, Darwin.")
    arch: Text = key("Instruction set architecture: x86_64, aarch64.")
    board: Text | None = key("Name of a single-board computer, else null.")
    gpu: Gpu | None = key("The first NVIDIA GPU; null without one.")
    versions: Versions = key("Python and the runtimes by version, null where absent.")


class Artefact(Format):
    """A file that says where and of what it was made."""

    machine: Machine = key("Where it was made.")
    provenance: Provenance = key("The parameters, inputs and versions it was made with.")


class Throughput(Format):
    """Images a second, over the steps of a training."""

    median: Size = key("Median, images a second.")
    iqr: Size = key("Upper less lower quartile, images a second.")


class StageMs(Format):
    """Median time of each part of a step, ms; 0 where the method has no such part."""

    __pydantic_extra__: dict[str, Size]
    read: Size = key("Features from the feature cache, ms.")
    view: Size = key("Making the views, ms.")
    replay: Size = key("The teacher's last block, or all of it where nothing is stored, ms.")
    student: Size = key("The student's forward pass, ms.")
    projector: Size = key("Projectors and their losses, ms.")
    terms: Size = optional("Every loss but CAKD's, ms.")
    adversarial: Size = key("The adversarial loss and the discriminator's own step, ms.")
    backward: Size = optional("The backward pass, ms.")
    optimizer: Size = key("The optimiser's update, ms.")


class R12(Format):
    """Mean over the stored views of the teacher's largest raw logit over the second largest (arXiv 2605.15689)."""

    mean: Annotated[float, Field(ge=1)] = key("The mean ratio; smaller is better.")
    views: Positive = key("Views in it: those whose second largest logit is above 0.")


class Training(Format):
    """The figures of one training."""

    teacher_r12: R12 | None = optional("Of the teacher, from the manifest of the feature cache.")
    method: Text = optional("plain, logits, cakd, cakd+logits, ...")
    img_per_s: Throughput = key("Images a second, over the steps.")
    stage_ms: StageMs = key("Median time of each part of a step, ms.")
    stall_fraction: Fraction = key("Share of the time spent on reading and on views, 0..1.")
    peak_mb: Size = key("Peak memory, in 1e6 bytes.")
    steps: Positive = key("Iterations of the student.")
    batch: Positive = key("Images a step.")
    labels_seen: Count = optional("Labels the training was shown.")
    losses: dict[str, Loss] = optional(
        "Loss term, unweighted, to its mean over the last window of steps. Not in train_perf.json."
    )
    curves: dict[str, list[Annotated[list[Loss], Field(min_length=2, max_length=2)]]] = optional(
        "Only in older files. Loss term, unweighted, to its course: [step, mean of the window], ..."
    )


class Train(Artefact, Training):
    """Written by the stage distill, one file a method: speed, time by stage and the last losses of a training.

    The losses of every step are in reports/curves/<method>.csv.
    """

    schema_: Literal["cakd.train/1"] = schema_key()
    method: Text = key("plain, logits, cakd, cakd+logits, ...")
    student: Text = optional("Its name in distill.students; not of distill.student.")


class ValFigures(Format):
    """How one student did on the val images."""

    top1: Fraction = key("Share of images whose first answer is right, 0..1.")
    nll: Size = key("Mean negative log-likelihood of the label, nats.")
    n: Positive = key("Images judged.")


class StudentFigures(ValFigures):
    """How one of several students did on val, by its best method, and what it costs too much of."""

    method: Text = key("Its selected method.")
    over_budget: list[str] = key(
        "The budgets it does not keep, in words; empty where it keeps all."
    )


class Selection(Artefact):
    """Written by the stage select: every student on the val images, and the method whose student is exported.

    The stage export takes its student by it; the test images have no part in it.
    """

    schema_: Literal["cakd.selection/1"] = schema_key()
    split: Literal["val"] = key("The images that decided.")
    methods: dict[str, ValFigures] = key("Method to its figures on val.", min_length=1)
    selected: Text = key("The method whose student is exported.")
    reason: Text = key("Why this one, a sentence.")
    student: Text = optional(
        "Of several students the one that is exported; `student`: distill.student."
    )
    students: dict[str, StudentFigures] = optional(
        "Every student of the run, where there are several."
    )


class _Entry(Format):
    """One model of build.json: built, or skipped with a reason."""

    status: Literal["built", "skipped"] = key("Whether there is an artefact.")
    reason: Text | None = key("Why it was skipped, fell back to fp32, or was not checked here.")
    artefact: Text | None = key("Name of the file beside this one.")
    precision_requested: Requested = key("The target's; default: the runtime's choice.")
    precision_effective: Precision | None = key("What the artefact computes in.")
    size_mb: Size | None = key("The artefact with its weights, in 1e6 bytes.")
    seconds: Size | None = key("Time to build and check it.")


class BuiltModel(_Entry):
    """A model that was built."""

    status: Literal["built"]
    artefact: Text
    precision_effective: Precision
    size_mb: Size
    seconds: Size


class SkippedModel(_Entry):
    """A model that was not built, with the reason."""

    status: Literal["skipped"]
    reason: Text
    artefact: None


BuildEntry = Annotated[BuiltModel | SkippedModel, Field(discriminator="status")]


class BuildModels(Format):
    """The two models that are built."""

    student: BuildEntry = key("The exported student.")
    teacher: BuildEntry = key("Its teacher, for comparison.")


class BuildFile(Artefact):
    """Written by the stage build, one file a target: which artefact ships for each model, in which precision, why.

    The stage bench runs what it names.
    """

    schema_: Literal["cakd.build/1"] = schema_key()
    target: Text = key("Requested runtime and precision: ort-fp32, ov-default, ...")
    models: BuildModels = key("The two models that are built.")


ParityVerdict = Literal["PASS", "FAIL", "REJECTED", "UNDECIDED", "skipped"]


class _Parity(Format):
    """One artefact against torch, on the reference images."""

    artifact: Text = key("Name of the file.")
    target: Text = optional("Its target, in the merged file.")
    runtime: Text | None = key("Name and version of what ran it; null where nothing did.")
    precision_effective: Requested = key(
        "What the runtime computed in; skipped: what was requested."
    )
    max_abs: Size | None = key("Largest absolute difference, logits; null: not finite.")
    rel_between_std: Size | None = key("The same over the std between images, a ratio.")
    sqnr_centered_db: float | None = key(
        "Signal to noise after the mean over images is taken off, dB; 200 for bit-equal."
    )
    top1_agreement: Fraction | None = key("Share of images with the same first answer, 0..1.")
    int8: str = optional("What of the network is in int8, in words; int8 only.")
    top1_drop: SignedFraction | None = optional("Top-1 lost to int8, a fraction -1..1; int8 only.")
    images: Annotated[int, Field(ge=2)] | None = optional("Images compared; null: nothing ran.")
    verdict: ParityVerdict = key(
        "PASS and FAIL by the gate of the precision; REJECTED: failed, and another precision took its place; "
        "UNDECIDED: the reference does not react to its input; skipped: it could not run here."
    )
    reason: Text | None = key("Why it is not PASS.")


class PassedParity(_Parity):
    """An artefact that gives torch's answers."""

    runtime: Text
    precision_effective: Precision
    max_abs: Size
    rel_between_std: Size
    sqnr_centered_db: float
    top1_agreement: Fraction
    verdict: Literal["PASS"]


class OtherParity(_Parity):
    """An artefact that does not, or that did not run, with the reason."""

    verdict: Literal["FAIL", "REJECTED", "UNDECIDED", "skipped"]
    reason: Text


ParityRow = Annotated[PassedParity | OtherParity, Field(discriminator="verdict")]


class ParityFile(Artefact):
    """Written by the stage build, one file a target: how far each artefact's logits are from torch's own.

    The stage report merges the rows of all targets into reports/parity.json, each with its target.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": ["target"]},
                {"properties": {"rows": {"items": {"required": ["target"]}}}},
            ]
        }
    )
    schema_: Literal["cakd.parity/1"] = schema_key()
    target: Text = optional("The target of all rows; the merged file has none.")
    rows: list[ParityRow] = key("An artefact each, those rejected on the way included.")

    @model_validator(mode="after")
    def _check_target(self) -> ParityFile:
        if "target" not in self.model_fields_set:
            for row in self.rows:
                if "target" not in row.model_fields_set:
                    raise ValueError(
                        f"target: got none in the file and in {row.artifact}; expected one"
                    )
        return self
