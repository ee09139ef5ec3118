"""The manifest of a feature cache: what was stored, from what, and the hash of every shard."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Strict, field_validator, model_validator

from pipeline.core.formats import R12, Provenance
from pipeline.core.validation import (
    Count,
    Format,
    Positive,
    Sha256,
    Size,
    Text,
    key,
    optional,
    schema_key,
)

Shape = list[Annotated[int, Field(ge=1)]]
StoredType = Literal["F32", "F16", "BF16", "I8", "I64"]
StoredField = Annotated[tuple[StoredType, Shape], Strict(False)]  # JSON has no tuples
# layout -> fields of a record
FEATURES: dict[str, tuple[str, ...]] = {
    "block_input": ("x", "features_checksum"),
    "qkvh": ("qkv", "h", "features_checksum"),
    "logits": (),
}
# Conditions of the schema: something is stored; not only logits.
ON: dict[str, Any] = {"properties": {"mode": {"const": "on"}}}
FEATURES_KEPT: dict[str, Any] = {"layout": {"enum": ["block_input", "qkvh"]}}


class Errors(Format):
    """Relative error of each tensor replayed from the cache against the live teacher; empty in mode off."""

    q: Size = optional("Queries, a ratio of norms.")
    k: Size = optional("Keys, a ratio of norms.")
    v: Size = optional("Values, a ratio of norms.")
    h: Size = optional("Final features, a ratio of norms.")
    logits: Size = optional("Logits, a ratio of norms.")


class Fields(Format):
    """The tensors of a record: name, then the storage type as safetensors names it and the shape."""

    __pydantic_extra__: dict[str, StoredField]
    logits: StoredField = key("Storage type and shape.")
    view_hash: StoredField = key("Storage type and shape.")
    checksum: StoredField = key("Storage type and shape.")


class Ratios(Format):
    """The part of R12 that one shard has."""

    sum: Annotated[float, Field(ge=0)] = key("Sum of the ratios.")
    views: Count = key("Their number.")


class ShardEntry(Format):
    """One shard."""

    file: Text = key("Its name.")
    records: Positive = key("Records in it.")
    bytes: Positive = key("Its size in bytes.")
    sha256: Sha256 = key("SHA-256 of its bytes.")
    error: dict[str, Any] = key("The relative errors of this shard.")
    ratios: Ratios = optional("The part of R12 that this shard has.")

    @field_validator("file")
    @classmethod
    def _check_file(cls, name: str) -> str:
        if Path(name).name != name or name == "..":
            raise ValueError(f"got {name!r}; expected the name of a file beside the manifest")
        return name


class Fingerprint(Format):
    """Every line that decides what the records hold; a cache is usable only where all of them still agree."""

    teacher: Sha256 = key("SHA-256 of the teacher's weights.")
    teacher_model: Sha256 = key("SHA-256 of its name, arguments, classes and preprocessing.")
    images: Sha256 = key("SHA-256 of the prepared pixels.")
    order: Sha256 = key("SHA-256 of the rows of the training split, in order.")
    classes: Sha256 = key("SHA-256 of the class names, in order.")
    view_backend: Text = key("Who computes the views.")
    torch: Text = key("Installed version.", alias="version of torch")
    timm: Text = key("Installed version.", alias="version of timm")
    crop: Annotated[list[float], Field(min_length=2, max_length=2)] = key(
        "Shares of the image's area.", alias="geometry.crop"
    )
    aspect: float = key("Widest ratio of the sides.", alias="geometry.aspect")
    rotate: float = key("Largest rotation in degrees.", alias="geometry.rotate")
    flip: bool = key("Whether half of the views are mirrored.", alias="geometry.flip")
    views: Positive = key("Views an image.")
    seed: int = key("Seed of the views.")
    dtype: str = key("Storage type of the features.")
    layout: str = key("The content of a record.")


class Manifest(Format):
    """Written by the stage cache: the views of each training image, what is stored of them, and its error.

    distill refuses a feature cache whose fingerprint or shards differ.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "allOf": [
                {
                    "if": ON,
                    "then": {
                        "properties": {
                            "records": {"minimum": 1},
                            "error": {"required": ["logits"]},
                            "shards": {"minItems": 1},
                        }
                    },
                    "else": {"properties": {"records": {"const": 0}, "shards": {"maxItems": 0}}},
                },
                {
                    "if": {"properties": {**ON["properties"], **FEATURES_KEPT}},
                    "then": {"properties": {"error": {"required": ["h"]}}},
                },
                {
                    "if": {
                        "properties": {
                            **ON["properties"],
                            **FEATURES_KEPT,
                            "no_attention": {"type": "null"},
                        }
                    },
                    "then": {"properties": {"error": {"required": ["q", "k", "v"]}}},
                },
            ]
        }
    )
    schema_: Literal["cakd.store/3"] = schema_key()
    mode: Literal["on", "off"] = key("off: nothing is stored, the teacher runs while distilling.")
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = key(
        "Storage type of the features; int8: with a scale a record and channel."
    )
    layout: Literal["block_input", "qkvh", "logits"] = key(
        "block_input: the input of the teacher's last block, or its final features where no_attention is a text; "
        "qkvh: what the method takes from that block; logits: nothing beside them."
    )
    views: Positive = key("Views an image.")
    write_batch: Positive = optional("Views in one forward pass of the teacher.")
    images: Count = key("Training images.")
    records: Count = key("Stored views: images times views, or 0 in mode off.")
    bytes_per_view: Size = key("Bytes on disk of a record, the mean of all; 0 in mode off.")
    fields: Fields = key("The tensors of a record.", alias="fields")
    n_heads: Count = key("Heads of the teacher's last block; 0 where no_attention says why.")
    no_attention: str | None = optional(
        "Why the teacher has no queries, keys and values; null where it has them."
    )
    width: Positive = key("Channels of the teacher's tokens.")
    error: Errors = key("The largest relative errors, of the records compared while writing.")
    r12: R12 | None = optional("How sure the teacher is; null in mode off. Absent in older caches.")
    h_mean: list[float] = key("Mean of each channel of the final features.", min_length=1)
    h_std: list[Annotated[float, Field(gt=0)]] = key("Standard deviations.", min_length=1)
    fingerprint: Fingerprint = key("What decides the content of the records.")
    shards: list[ShardEntry] = key("The files beside this one, in order; none in mode off.")
    provenance: Provenance = key("The policy; what it was made from is in the fingerprint.")
    sha256: Sha256 = key("SHA-256 of all the other keys, as JSON with sorted keys.")

    def _compared(self) -> set[str]:
        """The tensors whose error is measured while writing."""
        if self.layout == "logits":
            return {"logits"}
        return {"h", "logits"} | ({*"qkv"} if self.no_attention is None else set())

    @model_validator(mode="after")
    def _check_records(self) -> Manifest:
        records = sum(shard.records for shard in self.shards)
        if records != self.records or bool(records) != (self.mode == "on"):
            raise ValueError(
                f"records: got {self.records} in mode {self.mode}; expected those of the shards, {records}"
            )
        fields = self.fields.model_fields_set
        if self.mode == "on" and not fields.issuperset(FEATURES[self.layout]):
            raise ValueError(
                f"fields: got {', '.join(sorted(fields))}; expected {', '.join(FEATURES[self.layout])} too"
            )
        if self.mode == "on" and (missing := self._compared() - self.error.model_fields_set):
            raise ValueError(f"error: got no {', '.join(sorted(missing))}; expected all in mode on")
        return self
