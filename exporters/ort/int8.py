"""int8 for CPUs: pictures to take ranges and to judge by, and what stays in float until the gates are met."""

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
from exporters.ort import quantize, sensitive
from exporters.ort.session import OrtSession
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

CALIBRATION = 256  # images to calibrate on, and as many at most to judge by
FEWEST = 8  # different images int8 can be made from
MIN_DEVIATION = 1e-3  # of a channel's normalised pixels, below which it is of one colour
NO_CALIBRATION = "--precision int8: no --calib; give a folder of images like those to come"


@dataclass(frozen=True)
class CalibrationImages:
    """Images (M, 3, S, S) to calibrate on; images (N, 3, S, S) to judge by with their labels (N,), -1 unknown."""

    shown: Array
    held: Array
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Settings:
    """How int8 is made: what takes the ranges, and how long nodes to leave in float may be looked for."""

    calibration: Calibration = "minmax"
    search_s: float = 60.0
    drop: float = 0.01  # top-1 that may be lost on the images to judge by, as a fraction
    force: bool = False  # write a conversion that parity cannot decide


def calibration_images(source: Path, folder: Path | None) -> CalibrationImages:
    """Every other image of a folder to calibrate on, the others to judge by, as the ONNX's notes prepare them.

    Raises UserError: no folder given, fewer than 8 different images, images of one class alone, a network that
    answers NaN: its ranges have no scale.
    """
    if folder is None:
        raise UserError(NO_CALIBRATION)
    session = OrtSession(source, 1)
    batch = session.input_shape[0] or 1
    x, labels = inputs.labelled_images(folder, session, 2 * CALIBRATION)
    fewest = max(FEWEST, 2 * batch)
    if len(x) < fewest:
        raise UserError(f"--calib {folder}: holds {len(x)} images; int8 needs {fewest}")
    _check_variety(folder, x, labels, len(metadata.classes(session.metadata)))
    if not np.isfinite(session.run(x[:batch])).all():
        raise UserError(
            f"{source}: answers {folder} with NaN or infinity: int8 has no range for that"
        )
    held = slice(1, len(x) // 2 // batch * batch * 2, 2)
    return CalibrationImages(x[::2], x[held], labels[held])


def _check_variety(folder: Path, x: Array, labels: NDArray[np.int64], classes: int) -> None:
    """Raise UserError where images (N, 3, S, S) cannot show the ranges that activations take."""
    varied = x[x.std(axis=(2, 3)).max(axis=1) > MIN_DEVIATION]
    different = len({image.tobytes() for image in varied})
    if different < FEWEST:
        raise UserError(
            f"--calib {folder}: got {different} different images that are not of one colour, of {len(x)}; "
            f"expected {FEWEST} or more; give images like those to come"
        )
    known = set(labels[labels >= 0].tolist())
    if classes > 1 and len(known) == 1 and (labels >= 0).all():
        raise UserError(
            f"--calib {folder}: got images of {len(known)} class of {classes}; expected several; give images "
            "of all classes"
        )


def quantize_within_gates(
    source: Path, pictures: CalibrationImages, how: Settings, gates: agreement.Thresholds
) -> onnx.ModelProto:
    """fp32 ONNX -> int8 for CPUs; what had to stay in float to meet the gates is told by the note `int8`."""
    reference = OrtSession(source, 1)
    expected = inputs.run_batches(reference, pictures.held)

    def judge(network: onnx.ModelProto) -> sensitive.Trial:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / source.name
            onnx_file.write_onnx(network, path)
            got = inputs.run_batches(OrtSession(path, 1), pictures.held)
        figures = agreement.figures(expected, got)
        verdict, _ = agreement.judge(figures, float(np.abs(expected).max()), "int8", gates)
        refused = agreement.exceeds(agreement.top1_drop(expected, got, pictures.labels), how.drop)
        decibel = figures["sqnr_centered_db"]
        return sensitive.Trial(
            verdict != "FAIL" and not refused, -math.inf if decibel is None else decibel
        )

    with quantize.Calibrated(
        onnx_file.read_onnx(source), pictures.shown, False, how.calibration
    ) as net:
        found = sensitive.search(net, judge, how.search_s)
    return onnx_file.add_metadata(found.network, int8=found.told())


def add_options(p: argparse.ArgumentParser) -> None:
    """The options that int8 is made by."""
    add = p.add_argument
    add("--force", action="store_true", help="write a conversion whose parity is UNDECIDED too")
    add("--calib", type=Path, help="images to calibrate int8 on: a folder or a prepared one")
    add("--calibration", choices=tuple(quantize.METHODS), default="minmax", help="of the ranges")
    add(
        "--search-seconds",
        type=float,
        default=Settings.search_s,
        help="how long nodes to leave in float may be looked for where int8 fails its gates",
    )
