"""Which views of each image are stored, and every line that decides whether a store still fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

from pydantic import PositiveInt
from pydantic.dataclasses import dataclass

from pipeline.core import artifacts
from pipeline.core.config import STRICT, Seed
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.data.views import Geometry
from pipeline.models.probe import TeacherSpec
from pipeline.training.compute import Device

Lines = dict[str, Any]


@dataclass(frozen=True, config=STRICT)
class Cache:
    """`cache:` which views of each training image the teacher sees, and whether its features are stored."""

    mode: Literal["on", "off"] = "on"  # off: the same views, the teacher runs while distilling
    layout: Literal["block_input", "qkvh"] = "block_input"  # qkvh: 4 times the bytes, no replay
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    views: PositiveInt = 4  # V views an image
    geometry: Geometry = Geometry()
    batch: PositiveInt = 64  # images the teacher sees at once while writing
    shard_mb: PositiveInt = 256
    seed: Seed = 0
    device: Device = "auto"  # of the teacher; by rounding the bytes depend on it


def asked(cache: Cache) -> Lines:
    """The lines of a fingerprint that params.yaml decides."""
    geometry = {
        f"geometry.{name}": list(value) if isinstance(value, tuple) else value
        for name, value in asdict(cache.geometry).items()
    }
    return {
        **geometry,
        "views": cache.views,
        "seed": cache.seed,
        "layout": cache.layout,
        "dtype": cache.dtype,
    }


def surroundings(prepared: Prepared, teacher_description: dict[str, Any]) -> Lines:
    """The lines that the images, the teacher and the installed packages decide."""
    built = {k: teacher_description[k] for k in ("model", "kwargs", "num_classes", "preprocess")}
    return {
        "teacher": teacher_description["weights_sha256"],
        "teacher_model": artifacts.digest(built),
        "images": prepared.images_sha256,
        "order": artifacts.digest(prepared.rows("train").tolist()),
        "classes": artifacts.digest(list(prepared.classes)),
        "view_backend": views.BACKEND,
        **{f"version of {name}": artifacts.versions()[name] for name in ("torch", "timm")},
    }


def fingerprint(cache: Cache, prepared: Prepared, teacher_description: dict[str, Any]) -> Lines:
    """Every line that decides what the records hold; a store is usable only where all of them agree."""
    return {**surroundings(prepared, teacher_description), **asked(cache)}


def check_layout(cache: Cache, found: TeacherSpec) -> None:
    """Raise UserError where the layout would not bring back what the teacher's last block did."""
    if cache.mode == "on" and cache.layout == "qkvh" and found.no_attention:
        raise UserError(
            f"cache.layout: got qkvh, but of this teacher {found.no_attention}; use block_input"
        )
    if cache.mode == "on" and cache.layout == "block_input" and found.not_replayable:
        raise UserError(
            f"cache.layout: got block_input, but of this teacher {found.not_replayable}; use qkvh"
        )


def check_data(prepared: Prepared, teacher_description: dict[str, Any]) -> None:
    """Raise UserError where the teacher was made for other classes or another size than the images have."""
    classes, size = (
        teacher_description.get("classes"),
        teacher_description["preprocess"]["image_size"],
    )
    if classes is not None and tuple(classes) != prepared.classes:
        raise UserError(
            f"{prepared.folder}: its classes {_few(prepared.classes)} are not the teacher's {_few(classes)}; "
            "teach again on these images"
        )
    if size != prepared.image_size:
        raise UserError(
            f"{prepared.folder}: its images are {prepared.image_size} px, the teacher takes {size} px; teach again"
        )


def _few(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    return f"({len(names)}: {shown}{', ...' if len(names) > 3 else ''})"


def check_fingerprint(folder: Path, marks: Lines, now: Lines) -> None:
    """Raise UserError with the first line of the fingerprint that differs from what stands here now."""
    for line, value in now.items():
        if marks.get(line) != value:
            raise UserError(
                f"{folder}: stale feature store: {line} was {marks.get(line)}, is {value}; run cache again"
            )
