"""accuracy.json, evidence.json and train_perf.json of the stage evaluate, device.json of the stage device."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from pipeline.core.formats import Artefact, Machine, Provenance, Training
from pipeline.core.validation import (
    Count,
    Format,
    Fraction,
    Positive,
    Size,
    Split,
    Text,
    key,
    optional,
    schema_key,
)

Cosine = Annotated[float, Field(ge=-1, le=1)]
Points = Annotated[float, Field(ge=-100, le=100)]


class Figures(Format):
    """The accuracy of one model on one set of images."""

    top1: Fraction = key("Share of images whose first answer is right, 0..1.")
    top5: Fraction = key("Share whose label is one of the five most probable classes, 0..1.")
    nll: Size = key("Mean negative log-likelihood of the label, nats.")
    ece: Fraction = key("Expected calibration error over equal-width bins, 0..1.")
    n: Positive = key("Images judged.")


class Difference(Format):
    """The paired difference of clean top-1 between a model and a baseline."""

    better: Count = key("Images that only this model gets right.")
    worse: Count = key("Images that only the baseline gets right.")
    points: Points = key("Top-1 less that of the baseline, percentage points.")
    low: Points = key("Lower end of its 95 % interval (Agresti and Min 2005), points.")
    high: Points = key("Upper end, points.")


class Cosines(Format):
    """Mean cosine between teacher and student where the projectors put them."""

    attention: Cosine = key("Of a head's output at a token, -1..1.")
    tokens: Cosine = key("Of the final features of a token, -1..1.")


class Model(Format):
    """One model and its accuracy."""

    clean: Figures = key("On the images as they are.")
    noisy: Figures = key("On every image with every kind of noise.")
    noisy_by_kind: dict[str, Figures] = optional("Kind of noise to the figures with it.")
    params: Positive = key("Parameters.")
    macs: Positive = key("Multiply-accumulates of one image.")
    model: Text = optional("Its name in timm.")
    seed: int = key("Seed of its training.")
    labels_seen: Count = key("Labels its training was shown.")
    labels_total: Positive = key("Labels the training images have.")
    images_seen: Count = optional("Images of the training split, with or without label.")
    against: dict[str, Difference] = optional(
        "Baseline to the paired difference of clean top-1: plain, and of a method that reads the teacher the "
        "control on its batches and transform (control or control+trans); those that were trained."
    )
    cosine: Cosines = optional("Between teacher and student; methods with projectors only.")


class Models(Format):
    """The teacher, and each student by its method."""

    __pydantic_extra__: dict[str, Model]
    teacher: Model = key("The teacher.")


class BriefModel(Format):
    """The accuracy and size of a student that is not exported, by one method."""

    clean: Figures = key("On the images as they are.")
    noisy: Figures = key("On every image with every kind of noise.")
    params: Positive = key("Parameters.")
    macs: Positive = key("Multiply-accumulates of one image.")


class Accuracy(Artefact):
    """Written by the stage evaluate: accuracy of the teacher and of every student, clean and under noise.

    The report judges the exported student by it.
    """

    schema_: Literal["cakd.accuracy/1"] = schema_key()
    split: Split = optional("The images the models were judged on.")
    classes: list[str] = optional("Class names in the order of the logits.", min_length=1)
    noise: list[str] = optional("The kinds of noise behind `noisy`, none of them trained with.")
    models: Models = key("The teacher, and each student by its method.")
    students: dict[str, dict[str, BriefModel]] = optional(
        "Of several students those that are not exported, by name and method."
    )


class Mistake(Format):
    """A wrong answer."""

    row: Annotated[int, Field(ge=0)] = key("Row of the prepared folder.")
    label: Annotated[int, Field(ge=0)] = key("Number of the true class.")
    predicted: Annotated[int, Field(ge=0)] = key("Number of the predicted class.")
    confidence: Fraction = key("Softmax of the predicted class, a fraction.")


class Mistakes(Format):
    """The mistakes of one model."""

    confusion: list[
        Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=3, max_length=3)]
    ] = key("[true class, predicted class, images] for every pair that occurs.")
    mistakes: list[Mistake] = key("The most confident wrong answers, the most confident first.")


class Attention(Format):
    """Attention received by the patches of some images, 1 where it is uniform."""

    grid: list[Annotated[int, Field(ge=0)]] = key("Height and width of the token grid.")
    rows: list[Annotated[int, Field(ge=0)]] = key("Rows of the prepared folder.")
    received: dict[str, list[list[Annotated[float, Field(ge=0)]]]] = key(
        "By model, a map (N patches) for each row, in times uniform."
    )


class Evidence(Artefact):
    """Written by the stage evaluate: confusions, most confident mistakes, and the attention by patch."""

    schema_: Literal["cakd.evidence/1"] = schema_key()
    split: Split = key("The split judged.")
    classes: list[str] = key("Class names by number.")
    models: dict[str, Mistakes] = key("By model: the teacher and every method.")
    attention: Attention = key("Attention received, 1 where it is uniform.")


class TrainPerf(Format):
    """Written by the stage evaluate: the train/<method>.json of every method in one file, for the report."""

    schema_: Literal["cakd.train_perf/1"] = schema_key()
    methods: dict[str, Training] = key("Method to the figures of its training.")
    machine: Machine = key("Where the files were merged.")
    provenance: dict[str, Provenance] = key("Method to the provenance of its train/<method>.json.")


class Device(Artefact):
    """Written by the stage device on every run: this machine.

    The stages build and bench depend on it, so that other hardware runs them again.
    """

    schema_: Literal["cakd.device/1"] = schema_key()
