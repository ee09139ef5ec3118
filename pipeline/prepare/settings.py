"""`prepare:` of params.yaml."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import Field, PositiveInt, field_validator, model_validator
from pydantic.dataclasses import dataclass
from typing_extensions import Self

from pipeline.core.config import STRICT, Seed
from pipeline.core.errors import nearest
from pipeline.data.prepared import MAX_SIDE
from pipeline.prepare.sources import cifar, digits, imagefolder, parquet, zoo
from pipeline.prepare.sources.sample import Source

SOURCES: dict[str, Source] = {
    "digits": digits.read,
    "imagefolder": imagefolder.read,
    "parquet": parquet.read,
    "cifar": cifar.read,
}
# a share of the images, or a count
SplitSize = Annotated[float, Field(gt=0, lt=1)] | Annotated[float, Field(ge=1, multiple_of=1)]


@dataclass(frozen=True, config=STRICT)
class Prepare:
    """`prepare:` which images, at what size, and how many labels the student may see."""

    # digits | imagefolder | parquet | cifar | torchvision:<Name>
    source: str = Field(json_schema_extra={"pattern": f"^({'|'.join(SOURCES)}|{zoo.PREFIX}.+)$"})
    path: str | None = None  # a folder, file or pattern, as the source says
    label_column: str | None = None  # of a table, parquet or cifar, where there are several
    image_column: str | None = None  # of a table or parquet, where there are several
    # of imagefolder: its first group is the class in a file's name
    label_pattern: str | None = None
    image_size: int = Field(default=224, ge=8, le=MAX_SIDE)  # pixels a side of the network's input
    # raw: squares of image_size in one array; packed: encoded images of their own shape; auto: raw where all of
    # them are squares of at most image_size
    stored: Literal["auto", "raw", "packed"] = "auto"
    # packed: pixels of the shorter side, at most; null: 1.25 image_size
    stored_side: Annotated[int, Field(ge=8, le=MAX_SIDE)] | None = None
    encoding: Literal["jpeg", "png"] = "jpeg"  # packed: jpeg of quality 95, or png, lossless
    # an image that is no square, as timm names it: center crop, or squash to a square; auto: center, but squash
    # where the median image is longer than 2:1
    crop_mode: Literal["auto", "center", "squash"] = "auto"
    student_labels: Literal["all"] | PositiveInt = "all"  # "all", or N labels a class
    val: SplitSize = 0.1  # images held out for gates and calibration
    test: SplitSize = 0.2  # the same for the test split, where the source brings none
    on_error: Literal["stop", "skip"] = "stop"  # an unreadable image: stop, or list it and go on
    seed: Seed = 0

    @field_validator("source")
    @classmethod
    def _check_source(cls, source: str) -> str:
        if source not in SOURCES and not source.startswith(zoo.PREFIX):
            known = [*SOURCES, f"{zoo.PREFIX}<Name>"]
            raise ValueError(f"got {source!r}; {nearest(source, known)}")
        return source

    @model_validator(mode="after")
    def _check_stored_side(self) -> Self:
        side = self.stored_side
        if side is not None and (self.stored == "raw" or side < self.image_size):
            raise ValueError(
                f"got stored_side {side} with stored {self.stored} and image_size {self.image_size}; expected "
                f"{self.image_size} or more, of packed images"
            )
        return self

    @field_validator("label_pattern")
    @classmethod
    def _check_label_pattern(cls, pattern: str | None) -> str | None:
        if pattern is not None and _groups(pattern) < 1:
            raise ValueError(
                f"got {pattern!r}; expected a regular expression with a group, '([a-z]+)_'"
            )
        return pattern


def _groups(pattern: str) -> int:
    try:
        return re.compile(pattern).groups
    except re.error:
        return 0
