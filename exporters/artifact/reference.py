"""The output of stage export: both models as ONNX, and the images and logits that check them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from exporters.artifact.session import Array
from pipeline.core.errors import UserError

# Model -> name of its images in reference.npz. Each model has its own normalisation of the same images.
IMAGES = {"student": "x", "teacher": "teacher_x"}
# Logits of the student before it was fine-tuned for int8; only where it was.
DISTILLED = "distilled"


@dataclass(frozen=True)
class Exported:
    """artifacts/export, opened: labels (N,); by model x (N, 3, S, S), logits (N, K); calibration (M, 3, S, S).

    distilled (N, K): logits that the accuracy of int8 is compared with, of a student that was fine-tuned for it.
    """

    folder: Path
    x: dict[str, Array]
    labels: NDArray[np.int64]
    logits: dict[str, Array]
    calibration: Array
    distilled: Array | None = None

    @classmethod
    def open(cls, folder: Path) -> Exported:
        """Read reference.npz and calibration.npy. Raises UserError: missing or damaged."""
        try:
            with np.load(folder / "reference.npz", allow_pickle=False) as file:
                arrays = {key: file[key] for key in ("labels", *IMAGES, *IMAGES.values())}
                distilled = file.get(DISTILLED)
            calibration = np.load(folder / "calibration.npy", allow_pickle=False)
        except (
            Exception
        ) as error:  # NumPy parses a header as Python text, and raises what that raises
            raise UserError(
                f"{folder}: not an export ({error}); expected reference.npz and calibration.npy; "
                "run `dvc repro export`"
            ) from None
        x = {model: arrays[key] for model, key in IMAGES.items()}
        logits = {model: arrays[model] for model in IMAGES}
        return cls(folder, x, arrays["labels"], logits, calibration, distilled)
