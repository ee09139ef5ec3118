"""The trained ranges beside a quantized student, by the names of its exported ONNX."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from pipeline.core.validation import Format, Sha256, Text, key, schema_key, schema_name

Scale = Annotated[float, Field(gt=0, le=1e15)]
Bias = Literal["int32", "float"]
LEVELS = (0, 255)  # of an activation in int8 for CPUs: unsigned
WEIGHT_LEVELS = (-128, 127)  # a scale per output channel, no zero point
SUFFIX = "-ranges.json"  # behind the stem of the checkpoint, and of its fp32 ONNX


class ActivationRange(Format):
    """The grid of a tensor: value = scale * (level - zero_point), level 0 to 255."""

    scale: Scale = key("Distance between two levels.")
    zero_point: Annotated[int, Field(ge=0, le=255)] = key("The level of the value 0.")


class WeightRange(Format):
    """The grid of a weight: value = scale of its channel * level, level -128 to 127."""

    scales: list[Scale] = key("One per output channel.", min_length=1)
    axis: Annotated[int, Field(ge=0, le=3)] = key("Axis of the output channels in the ONNX.")


class Ranges(Format):
    """Written by the stage quantize beside the student it fine-tuned: where int8 rounds, and by which scales.

    Tensors, weights and nodes have their names in the folded ONNX of the student.
    """

    schema_: Literal["cakd.ranges/1"] = schema_key()
    weights_sha256: Sha256 = key("SHA-256 of the student's .safetensors file.")
    activations: dict[Text, ActivationRange] = key("Tensor to its grid, per tensor.")
    weights: dict[Text, WeightRange] = key("Weight to its grid, per channel.")
    floating: list[Text] = key("Nodes that stay in float.")
    sqnr_db: float = key(
        "Of the simulated int8 against the same student in float32, val images, dB."
    )
    bias: Bias = key("Type of the biases in int8 for CPUs.")


SCHEMA = schema_name(Ranges)


def symmetric(grid: dict[str, Any]) -> float:
    """The scale of the signed symmetric grid that covers an activation's range."""
    low, high = (level - grid["zero_point"] for level in LEVELS)
    return float(max(-low, high) * grid["scale"] / WEIGHT_LEVELS[1])
