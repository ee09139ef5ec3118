"""The settings `cache:`, and the fingerprint that decides whether a store still fits."""

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
    # qkvh: 4 times the bytes, no replay; logits: 4 bytes a class, for methods that read no features
    layout: Literal["block_input", "qkvh", "logits"] = "block_input"
    dtype: Literal["float32", "float16", "bfloat16", "int8"] = "float16"
    views: PositiveInt = 4  # V views an image
    geometry: Geometry = Geometry()
    batch: PositiveInt = 64  # images the teacher sees at once while writing
    shard_mb: PositiveInt = 256
    seed: Seed = 0
    device: Device = "auto"  # of the teacher; by rounding the bytes depend on it


def policy_lines(cache: Cache) -> Lines:
    """List the lines of the fingerprint that come from params.yaml."""
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
    """List the lines that come from the images, the teacher and the installed packages."""
    built = {k: teacher_description[k] for k in ("model", "kwargs", "num_classes", "preprocess")}
    return {
        "teacher": teacher_description["weights_sha256"],
        "teacher_model": artifacts.digest(built),
        "images": prepared.images_sha256,
        "order": artifacts.digest(prepared.rows("train").tolist()),
        "classes": artifacts.digest(list(prepared.classes)),
        "view_backend": views.backend(prepared.images),
        **{f"version of {name}": artifacts.versions()[name] for name in ("torch", "timm")},
    }


def fingerprint(cache: Cache, prepared: Prepared, teacher_description: dict[str, Any]) -> Lines:
    """List every line that decides the content of the records; a store fits where all of them are equal."""
    return {**surroundings(prepared, teacher_description), **policy_lines(cache)}


def check_layout(cache: Cache, spec: TeacherSpec) -> None:
    """Check that the layout fits the teacher. Raises UserError: no Q, K, V to store, or no replay from x_L."""
    if cache.mode == "on" and cache.layout == "qkvh" and spec.no_attention:
        raise UserError(
            f"cache.layout: got qkvh for a teacher without Q, K, V ({spec.no_attention}); set it to block_input"
        )
    if cache.mode == "on" and cache.layout == "block_input" and spec.not_replayable:
        raise UserError(
            "cache.layout: got block_input for a teacher that cannot be replayed from it "
            f"({spec.not_replayable}); set it to qkvh"
        )


def check_data(prepared: Prepared, teacher_description: dict[str, Any]) -> None:
    """Check that teacher and images fit. Raises UserError: other classes, or another image size."""
    classes = teacher_description.get("classes")
    size = teacher_description["preprocess"]["image_size"]
    if classes is not None and tuple(classes) != prepared.classes:
        raise UserError(
            f"{prepared.folder}: classes: got {_few(prepared.classes)}; expected the teacher's {_few(classes)}; "
            "train the teacher again on these images"
        )
    if size != prepared.image_size:
        raise UserError(
            f"{prepared.folder}: image size: got {prepared.image_size} px; expected the teacher's {size} px; "
            "train the teacher again"
        )


def _few(names: Sequence[str]) -> str:
    first = ", ".join(names[:3])
    return f"({len(names)}: {first}{', ...' if len(names) > 3 else ''})"


def check_fingerprint(folder: Path, stored: Lines, current: Lines) -> None:
    """Compare a store's fingerprint with the current one. Raises UserError: the first line that differs."""
    for line, value in current.items():
        if stored.get(line) != value:
            raise UserError(
                f"{folder}: stale feature cache: {line}: got {stored.get(line)}; expected {value}; run cache again"
            )
