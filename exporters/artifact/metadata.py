"""The metadata inside an artefact: preprocessing, class names, precision and origin.

Flat text keys, so that ONNX metadata, OpenVINO rt_info and a plan's sidecar have the same ones:
image_size, mean, std (`0.485 0.456 0.406`), interpolation, crop, crop_pct, classes (one a line), precision, model,
role, method, weights_sha256, torch, timm.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from pipeline.core import artifacts
from pipeline.core.errors import UserError, nearest
from pipeline.data.decoding import CROPS

PRECISIONS = ("fp32", "fp16", "bf16", "int8")  # from fine to coarse
MAX_SIDE = 4096  # pixels a side
MAX_TEXT = 1000  # characters of a value that are read as numbers


def flatten(description: Mapping[str, Any], precision: str = "fp32") -> dict[str, str]:
    """The JSON beside a checkpoint -> flat metadata. Keys without a value are left out."""
    preprocess = description["preprocess"]
    properties = {
        "image_size": preprocess["image_size"],
        "mean": " ".join(map(repr, preprocess["mean"])),
        "std": " ".join(map(repr, preprocess["std"])),
        "interpolation": preprocess["interpolation"],
        "crop": preprocess["crop"],
        "crop_pct": preprocess.get("crop_pct", 1.0),
        "classes": "\n".join(description.get("classes") or []),
        "precision": precision,
        "model": description["model"],
        "role": description.get("role"),
        "method": description.get("method"),
        "weights_sha256": description["weights_sha256"],
        **artifacts.versions(("torch", "timm")),
    }
    return {k: str(v) for k, v in properties.items() if v not in (None, "")}


def check(properties: Mapping[str, str]) -> None:
    """Check the entries that are read. Raises UserError: a value that cannot be right."""
    image_size(properties)
    preprocessing(properties)
    if (got := properties.get("precision", "fp32")) not in PRECISIONS:
        raise UserError(f"metadata precision: got {got[:40]!r}; {nearest(got, PRECISIONS)}")


def image_size(properties: Mapping[str, str]) -> int | None:
    """Pixels a side; None without the entry. Raises UserError: not a size that an image can have."""
    if "image_size" not in properties:
        return None
    text = properties["image_size"]
    if not re.fullmatch(r"\d{1,9}", text, re.ASCII) or not 1 <= int(text) <= MAX_SIDE:
        raise UserError(
            f"metadata image_size: got {text[:40]!r}; expected 1 to {MAX_SIDE}; export it again"
        )
    return int(text)


def preprocessing(properties: Mapping[str, str]) -> dict[str, Any] | None:
    """The preprocessing as `pipeline.data.prepared.normalised` takes it; None where the artefact has none.

    Raises UserError: a size, mean or std that cannot be right.
    """
    if not {"image_size", "mean", "std"} <= set(properties):
        return None
    return {
        "image_size": image_size(properties),
        "interpolation": properties.get("interpolation", "bicubic"),
        "crop": properties.get("crop", CROPS["center"]),
        "crop_pct": _crop_pct(properties),
        "mean": _channel_values(properties, "mean"),
        "std": _channel_values(properties, "std"),
    }


def _crop_pct(properties: Mapping[str, str]) -> float:
    """The share of each side that is kept, 1 without the entry. Raises UserError: no share."""
    text = properties.get("crop_pct", "1")
    try:
        value = float(text[:MAX_TEXT])
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise UserError(
            f"metadata crop_pct: got {text[:40]!r}; expected a number above 0, at most 1; export it again"
        )
    return value


def _channel_values(properties: Mapping[str, str], key: str) -> list[float]:
    """One finite number per channel; of `std` above 0."""
    text = properties[key]
    try:
        values = [float(part) for part in text[:MAX_TEXT].split()]
    except ValueError:
        values = []
    minimum = 0.0 if key == "std" else -math.inf
    if len(values) != 3 or not all(math.isfinite(v) and v > minimum for v in values):
        bound = " above 0" if key == "std" else ""
        raise UserError(
            f"metadata {key}: got {text[:40]!r}; expected 3 finite numbers{bound}; export it again"
        )
    return values


def classes(properties: Mapping[str, str]) -> list[str]:
    """Class names in the order of the logits; empty where the artefact has none."""
    return properties["classes"].split("\n") if properties.get("classes") else []
