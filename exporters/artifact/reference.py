"""What stage export leaves for the others: both models as ONNX, the images and logits that prove them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.artifact.session import Array
from pipeline.core.errors import UserError

IMAGES = {"student": "x", "teacher": "teacher_x"}  # in reference.npz, each normalised for its model


@dataclass(frozen=True)
class Exported:
    """artifacts/export, opened: labels (N,); by model x (N, 3, S, S), logits (N, K); calibration (M, 3, S, S)."""

    folder: Path
    x: dict[str, Array]  # each model's own normalisation of the same pictures
    labels: NDArray[np.int64]
    logits: dict[str, Array]
    calibration: Array

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Read reference.npz and calibration.npy. Raises UserError: missing or damaged."""
        try:
            with np.load(folder / "reference.npz", allow_pickle=False) as held:
                found = {key: held[key] for key in ("labels", *IMAGES, *IMAGES.values())}
            calibration = np.load(folder / "calibration.npy", allow_pickle=False)
        except Exception as error:  # a header is parsed as Python text, and raises what that raises
            raise UserError(f"{folder}: not an export ({error}); run `dvc repro export`") from None
        x = {model: found[key] for model, key in IMAGES.items()}
        logits = {model: found[model] for model in IMAGES}
        return cls(folder, x, found["labels"], logits, calibration)
