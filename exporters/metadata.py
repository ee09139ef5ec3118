"""The notes that travel inside an artefact: how to prepare a picture, what the classes are, who made it.

Flat text keys, so that ONNX metadata, OpenVINO rt_info and a plan's sidecar carry the same ones:
image_size, mean, std (`0.485 0.456 0.406`), interpolation, crop, classes (one a line), precision, model,
role, method, weights_sha256, torch, timm.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pipeline import files


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
        **files.versions(("torch", "timm")),
    }
    return {k: str(v) for k, v in notes.items() if v not in (None, "")}


def preprocessing(notes: Mapping[str, str]) -> dict[str, Any] | None:
    """The preprocessing as `pipeline.data.normalised` takes it; None where the artefact carries none."""
    if not {"image_size", "mean", "std"} <= set(notes):
        return None
    return {
        "image_size": int(notes["image_size"]),
        "interpolation": notes.get("interpolation", "bicubic"),
        "crop": notes.get("crop", "resize the shorter side, centre crop"),
        "mean": [float(v) for v in notes["mean"].split()],
        "std": [float(v) for v in notes["std"].split()],
    }


def classes(notes: Mapping[str, str]) -> list[str]:
    """Class names in the order of the logits; empty where the artefact carries none."""
    return notes["classes"].split("\n") if notes.get("classes") else []
