"""What the strict pydantic models of our JSON files share: their base class, types of values, and keys."""

from __future__ import annotations

from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

MAX_INT = 2**53 - 1  # the largest whole number that every JSON reader keeps
MAX_FLOAT = 1e15  # no time, size or rate is larger

Count = Annotated[int, Field(ge=0, le=MAX_INT)]
Positive = Annotated[int, Field(ge=1, le=MAX_INT)]
Fraction = Annotated[float, Field(ge=0, le=1)]
SignedFraction = Annotated[float, Field(ge=-1, le=1)]
Size = Annotated[float, Field(ge=0, le=MAX_FLOAT)]
Milliseconds = Annotated[float, Field(ge=1e-9, le=MAX_FLOAT)]  # of a call: no clock is finer
Text = Annotated[str, Field(min_length=1)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Precision = Literal["fp32", "fp16", "bf16", "int8"]
Split = Literal["train", "val", "test"]


class Format(BaseModel):
    """A JSON object: strict in the keys it knows, open to others, which a later version may add."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


def key(description: str, **bounds: Any) -> Any:
    """Describe a required key for docs/schemas."""
    return Field(description=description, **bounds)


def optional(description: str, **bounds: Any) -> Any:
    """Describe a key that may be missing; where it is there, its value is checked."""
    return Field(default=None, description=description, **bounds)


def schema_key() -> Any:
    """Describe the key `schema` of a file; pydantic's own models have an attribute of that name."""
    return key("Name and version of this format.", alias="schema")


def schema_name(kind: type[Format]) -> str:
    """Return the value of the key `schema` in the files that `kind` describes: `cakd.bench/2`."""
    (name,) = get_args(kind.model_fields["schema_"].annotation)
    return str(name)
