"""The Runtime object of ONNX Runtime."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact import onnx_file
from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build, Runtime
from exporters.ort import int8
from exporters.ort.session import OrtSession


def make(precision: str, model: str, exported: Exported, out: Path, settings: Build) -> Path:
    """Write MODEL.onnx as exported, or at int8 MODEL-int8.onnx for CPUs, into the folder `out`."""
    source = exported.folder / f"{model}.onnx"
    if precision == "int8":
        images = int8.CalibrationImages(exported.calibration, exported.x[model], exported.labels)
        options = int8.Settings(
            settings.int8_calibration, settings.int8_search_s, settings.int8_drop
        )
        proto = int8.quantize_within_gates(source, images, options, settings)
        path = out / f"{model}-int8.onnx"
    else:
        proto, path = onnx_file.read_onnx(source), out / source.name
    onnx_file.write_onnx(proto, path)
    return path


ORT = Runtime(
    "ort",
    ".onnx",
    make,
    lambda artefact, threads, _: OrtSession(artefact, threads),  # the precision is in the file
    packages=("onnxruntime",),
)
