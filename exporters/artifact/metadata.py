"""The notes that travel inside an artefact: how to prepare a picture, what the classes are, who made it.

Flat text keys, so that ONNX metadata, OpenVINO rt_info and a plan's sidecar carry the same ones:
image_size, mean, std (`0.485 0.456 0.406`), interpolation, crop, classes (one a line), precision, model,
role, method, weights_sha256, torch, timm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.core import artifacts
from pipeline.core.errors import UserError, nearest

PRECISIONS = ("fp32", "fp16", "bf16", "int8")  # from fine to coarse
MAX_SIDE = 4096  # pixels a side
TEXT = 1000  # characters of a note that are read as numbers


def flatten(description: Mapping[str, Any], precision: str = "fp32") -> dict[str, str]:
    """The JSON beside a checkpoint -> flat notes. Keys without a value are left out."""
    preprocess = description["preprocess"]
    notes = {
        "image_size": preprocess["image_size"],
        "mean": " ".join(map(repr, preprocess["mean"])),
        "std": " ".join(map(repr, preprocess["std"])),
        "interpolation": preprocess["interpolation"],
        "crop": preprocess["crop"],
        "classes": "\n".join(description.get("classes") or []),
        "precision": precision,
        "model": description["model"],
        "role": description.get("role"),
        "method": description.get("method"),
        "weights_sha256": description["weights_sha256"],
        **artifacts.versions(("torch", "timm")),
    }
    return {k: str(v) for k, v in notes.items() if v not in (None, "")}


def check(notes: Mapping[str, str]) -> None:
    """Raises UserError: a note we read that cannot be meant."""
    image_size(notes)
    preprocessing(notes)
    if (got := notes.get("precision", "fp32")) not in PRECISIONS:
        raise UserError(f"metadata precision: got {got[:40]!r}; {nearest(got, PRECISIONS)}")


def image_size(notes: Mapping[str, str]) -> int | None:
    """Pixels of the side; None where the artefact does not say. Raises UserError: no size a picture can have."""
    if "image_size" not in notes:
        return None
    text = notes["image_size"]
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 1 <= int(text) <= MAX_SIDE:
        raise UserError(
            f"metadata image_size: got {text[:40]!r}; allowed: 1 to {MAX_SIDE}; export it again"
        )
    return int(text)


def preprocessing(notes: Mapping[str, str]) -> dict[str, Any] | None:
    """The preprocessing as `pipeline.data.prepared.normalised` takes it; None where the artefact carries none.

    Raises UserError: a size, mean or std that cannot be meant.
    """
    if not {"image_size", "mean", "std"} <= set(notes):
        return None
    return {
        "image_size": image_size(notes),
        "interpolation": notes.get("interpolation", "bicubic"),
        "crop": notes.get("crop", "resize the shorter side, centre crop"),
        "mean": _three(notes, "mean"),
        "std": _three(notes, "std"),
    }


def _three(notes: Mapping[str, str], key: str) -> list[float]:
    """A number a channel, finite; a deviation above 0."""
    text = notes[key]
    try:
        values = [float(part) for part in text[:TEXT].split()]
    except ValueError:
        values = []
    least = 0.0 if key == "std" else -math.inf
    if len(values) != 3 or not all(math.isfinite(v) and v > least for v in values):
        bound = " above 0" if key == "std" else ""
        raise UserError(
            f"metadata {key}: got {text[:40]!r}; allowed: 3 finite numbers{bound}; export it again"
        )
    return values


def classes(notes: Mapping[str, str]) -> list[str]:
    """Class names in the order of the logits; empty where the artefact carries none."""
    return notes["classes"].split("\n") if notes.get("classes") else []
