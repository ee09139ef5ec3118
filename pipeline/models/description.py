"""The JSON beside a checkpoint, from which the plain timm model is rebuilt."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, model_validator

from pipeline.core.formats import Provenance
from pipeline.core.validation import (
    Count,
    Format,
    Positive,
    Sha256,
    Text,
    key,
    optional,
    schema_key,
)
from pipeline.data.prepared import MAX_SIDE

MAX_CLASSES = 1_000_000
Rgb = Annotated[list[float], Field(min_length=3, max_length=3)]
Deviation = Annotated[float, Field(gt=0)]
Grid = Annotated[list[Annotated[int, Field(ge=1)]], Field(min_length=2, max_length=2)]
OF_A_STAGE = ("labels_seen", "seed")  # keys of a checkpoint that a stage made
OF_A_STUDENT = ("method", "labels_total", "tap", "cakd", "space")


class Preprocess(Format):
    """The steps from a uint8 RGB image to the input of a model."""

    image_size: Annotated[int, Field(ge=1, le=MAX_SIDE)] = key("Side of the square input, pixels.")
    interpolation: Text = key("How an image is resized.")
    crop: Text = key("How an image becomes square.")
    mean: Rgb = key("Subtracted from each channel scaled to 0..1.")
    std: Annotated[list[Deviation], Field(min_length=3, max_length=3)] = key(
        "Each channel is divided by it afterwards."
    )


class Tap(Format):
    """Where a student's features were read for the projectors."""

    module: Text = key("Name of the module.")
    channels: Positive = key("Channels of its output.")
    grid: Grid = key("Rows and columns of its output.")
    tokens: Grid = key("Rows and columns of the teacher's tokens.")


class Space(Format):
    """The teacher's feature space as the projectors knew it."""

    n_heads: Positive = key("Attention heads.")
    width: Positive = key("Channels of a token.")
    h_mean: list[float] = key("Mean of each channel of the final features.")
    h_std: list[Deviation] = key("Standard deviation of each channel.")


class Description(Format):
    """Written by the stages teach and distill beside a .safetensors file: how to rebuild the timm model.

    A copy travels with the export and the torch-eager build.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "if": {"required": ["provenance"]},
            "then": {
                "required": list(OF_A_STAGE),
                "if": {"properties": {"role": {"const": "student"}}},
                "then": {"required": list(OF_A_STUDENT)},
                "else": {"required": ["grid"]},
            },
        }
    )
    schema_: Literal["cakd.model/1"] = schema_key()
    role: Literal["teacher", "student"] = key("Which of the two it is.")
    method: Text = optional("How a student was trained: plain, logits, cakd, ...")
    model: Text = key("Its name in timm.")
    kwargs: dict[str, Any] = key("Further arguments of timm.create_model.")
    num_classes: Annotated[int, Field(ge=1, le=MAX_CLASSES)] = key("Length of the logits.")
    classes: list[str] = key("Class names in the order of the logits.", min_length=1)
    preprocess: Preprocess = key("The steps from an image to the input.")
    grid: Grid = optional("Rows and columns of a teacher's patch tokens.")
    labels_seen: Count = optional("Labels its training was shown.")
    labels_total: Count = optional("Labels the training images have.")
    seed: int = optional("Seed of its training.")
    tap: Tap | None = optional("Where a student's features were read for the projectors; or null.")
    cakd: dict[str, Any] | None = optional("The parameters of the projectors' losses; or null.")
    space: Space | None = optional("The teacher's features as the projectors knew them; or null.")
    weights_sha256: Sha256 = key("SHA-256 of the .safetensors file; one of other bytes is refused.")
    provenance: Provenance = optional("Recipe, inputs and data; of every checkpoint a stage made.")

    @model_validator(mode="after")
    def _check_keys(self) -> Description:
        if len(self.classes) != self.num_classes:
            raise ValueError(
                f"classes: got {len(self.classes)} names; expected num_classes, {self.num_classes}"
            )
        needed = OF_A_STUDENT if self.role == "student" else ("grid",)
        for name in (*OF_A_STAGE, *needed) if "provenance" in self.model_fields_set else ():
            if name not in self.model_fields_set:
                raise ValueError(f"{name}: got nothing; expected this key in a {self.role}'s JSON")
        return self
