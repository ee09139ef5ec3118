"""quantize.json: int8 of the selected student by calibration and by training, as a strict model."""

from __future__ import annotations

from typing import Literal

from pydantic import model_validator

from pipeline.core.formats import Artefact
from pipeline.core.validation import (
    Count,
    Format,
    Fraction,
    Positive,
    Size,
    Text,
    key,
    optional,
    schema_key,
)
from pipeline.report.formats.bench import Interval


class Int8Row(Format):
    """The int8 of one target, every node that can be in int8."""

    target: Text = key("A target of bench.enabled.")
    ranges: Literal["calibration", "training"] = key("What set the ranges.")
    reason: Text | None = key("Why it was not run; else null.")
    runtime: Text | None = key("Name and version; null where it was not run.")
    top1: Fraction | None = key("Top-1 on the labelled images of val.")
    top1_agreement: Fraction | None = key(
        "Share of the images with the reference's answer: of the float32 network for calibration, of the "
        "simulation for training."
    )
    sqnr_centered_db: float | None = key("Of the same two, per-class mean removed, dB.")
    size_mb: Size | None = key("Size of the artefact, in 1e6 bytes.")


class Layer(Format):
    """A convolution or product with the nodes behind it."""

    name: Text = key("Name of the layer.")
    sqnr_db: float = key(
        "Centred SQNR of the logits with this layer alone in int8, calibrated, dB."
    )
    floating: bool = key("Whether it stays in float.")


class FloatLayer(Format):
    """A layer that `first`, `last` or `floating` left in float."""

    name: Text = key("One of `layers`.")
    nodes: list[Text] = key(
        "Its nodes that ONNX Runtime runs in float, and in int8 with every layer in int8."
    )


class Floating(Format):
    """The layers that the settings left in float, and what they cost in ONNX Runtime."""

    layers: list[FloatLayer] = key("Empty where every layer is in int8.")
    cpu_ratio: Interval | None = optional(
        "CPU time over that of the network with every layer in int8, paired; absent where no node runs in float."
    )
    reason: Text | None = optional("Why there is no ratio, where it could not be measured.")


class Quantized(Artefact):
    """Written by the stage quantize: what int8 costs the selected student before and after its fine-tuning."""

    schema_: Literal["cakd.quantize/1"] = schema_key()
    steps: Count = key("Steps of the fine-tuning; 0: there was none, and nothing was measured.")
    method: Text | None = key("The method whose student was fine-tuned; null without steps.")
    images: Positive = optional("Images of val behind the figures.")
    fp32_top1: Fraction = optional("Top-1 of the distilled student in float32.")
    rows: list[Int8Row] = key("A row for each target and origin of the ranges.")
    layers: list[Layer] = key("The layers of the student in graph order.")
    floating: Floating = optional("Layers left in float. Absent without steps and in older files.")

    @model_validator(mode="after")
    def _check_steps(self) -> Quantized:
        if self.steps and not {"images", "fp32_top1"} <= self.model_fields_set:
            raise ValueError(f"steps: got {self.steps} without images and fp32_top1; expected both")
        return self
