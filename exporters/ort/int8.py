"""int8 for CPUs: calibration images, held-out images for the gates, and nodes left in float to pass them."""

from __future__ import annotations

import argparse
import math
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import agreement, inputs, metadata, onnx_file
from exporters.artifact.runtime import Calibration
from exporters.artifact.session import Array
from exporters.ort import quantize, sensitive, trained
from exporters.ort.session import OrtSession
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

MAX_IMAGES = 256  # to calibrate on, and as many at most for the gates
MIN_IMAGES = 8  # different ones
MIN_DEVIATION = 1e-3  # of a channel's normalised pixels, below which it is of one colour
NO_CALIBRATION = (
    "--precision: got int8 and no --calib; expected images to calibrate on; pass --calib FOLDER"
)


@dataclass(frozen=True)
class CalibrationImages:
    """Images (M, 3, S, S) to calibrate on; held-out images (N, 3, S, S) with labels (N,), -1 unknown."""

    calibration: Array
    held_out: Array
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """int8 settings: calibration method, seconds to search nodes to leave in float, tolerated loss of top-1."""

    calibration: Calibration = "minmax"
    search_s: float = 60.0
    max_drop: float = 0.01  # of top-1 on the held-out images, as a fraction


def calibration_images(source: Path, folder: Path | None) -> CalibrationImages:
    """Every other image of a folder for calibration, the rest held out, prepared by the ONNX's metadata.

    Raises UserError: no folder given, fewer than 8 different images, images of one class alone, a network that
    outputs NaN, which has no int8 range.
    """
    if folder is None:
        raise UserError(NO_CALIBRATION)
    session = OrtSession(source, 1)
    batch = session.input_shape[0] or 1
    x, labels = inputs.labelled_images(folder, session, 2 * MAX_IMAGES)
    minimum = max(MIN_IMAGES, 2 * batch)
    if len(x) < minimum:
        raise UserError(
            f"--calib {folder}: got {len(x)} images; expected {minimum} or more; add images"
        )
    _check_variety(folder, x, labels, len(metadata.classes(session.metadata)))
    if not np.isfinite(session.run(x[:batch])).all():
        raise UserError(
            f"{source}: got NaN or infinity for the images of {folder}; int8 needs finite outputs; "
            "leave int8 out of --precision"
        )
    held_out = slice(1, len(x) // 2 // batch * batch * 2, 2)
    return CalibrationImages(x[::2], x[held_out], labels[held_out])


def _check_variety(folder: Path, x: Array, labels: NDArray[np.int64], classes: int) -> None:
    """Raise UserError where images (N, 3, S, S) cannot show the ranges that activations take."""
    varied = x[x.std(axis=(2, 3)).max(axis=1) > MIN_DEVIATION]
    different = len({image.tobytes() for image in varied})
    if different < MIN_IMAGES:
        raise UserError(
            f"--calib {folder}: got {different} different images that are not of one colour, of {len(x)}; "
            f"expected {MIN_IMAGES} or more; give images like those to come"
        )
    known = set(labels[labels >= 0].tolist())
    if classes > 1 and len(known) == 1 and (labels >= 0).all():
        raise UserError(
            f"--calib {folder}: got images of {len(known)} class of {classes}; expected several; give images "
            "of all classes"
        )


def quantize_within_gates(
    source: Path,
    images: CalibrationImages,
    settings: Settings,
    thresholds: agreement.Thresholds,
) -> onnx.ModelProto:
    """fp32 ONNX -> int8 for CPUs; the metadata entry `int8` says what stayed in float to pass the gates.

    With the trained ranges beside `source`, where there are any: those are not searched.
    """
    if (ranges := trained.beside(source)) is not None:
        proto = onnx_file.read_onnx(source)
        with quantize.Calibrated(proto, images.calibration) as network:
            return network.quantized(ranges=ranges)
    reference = OrtSession(source, 1)
    expected = inputs.run_batches(reference, images.held_out)

    def evaluate(network: onnx.ModelProto) -> sensitive.Trial:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / source.name
            onnx_file.write_onnx(network, path)
            logits = inputs.run_batches(OrtSession(path, 1), images.held_out)
        metrics, verdict, _ = agreement.compare_outputs(expected, logits, "int8", thresholds)
        drop = agreement.top1_drop(expected, logits, images.labels)
        passed = verdict != "FAIL" and not agreement.exceeds(drop, settings.max_drop)
        decibel = metrics["sqnr_centered_db"]
        return sensitive.Trial(passed, -math.inf if decibel is None else decibel)

    proto = onnx_file.read_onnx(source)
    with quantize.Calibrated(proto, images.calibration, False, settings.calibration) as network:
        result = sensitive.search(network, evaluate, settings.search_s)
    return onnx_file.add_metadata(result.network, int8=result.summary())


def add_options(p: argparse.ArgumentParser) -> None:
    """Add the command-line options of int8."""
    add = p.add_argument
    add(
        "--calib",
        type=Path,
        help="images to calibrate int8 on: a folder of images or a prepared folder",
    )
    add("--calibration", choices=tuple(quantize.METHODS), default="minmax", help="of int8")
    add(
        "--search-seconds",
        type=float,
        default=Settings.search_s,
        help="time to search nodes to leave in float where int8 fails its gates",
    )
