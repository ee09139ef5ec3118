"""ONNX -> TensorRT engine with its sidecar, by full TensorRT or TensorRT-RTX."""

from __future__ import annotations

import hashlib
import tempfile
import time
from pathlib import Path
from typing import Any

from exporters.artifact import onnx_file
from exporters.artifact.session import Array
from exporters.device.compiled_cache import sidecar_path
from exporters.ort import int8, quantize, trained
from exporters.trt import build, driver
from exporters.trt import plan as trt_plan
from exporters.trt.build import Options
from exporters.trt.plan import SCHEMA, backend, system
from pipeline.core import artifacts
from pipeline.core.atomic import atomic, make_parent
from pipeline.core.errors import UserError


def plan_path(source: Path, precision: str, name: str, options: Options) -> Path:
    """The default name of a plan: backend, version, GPU and precision, beside the ONNX."""
    label = trt_plan.label(name, backend(name)[1], options.hardware_compatible)
    return source.with_name(f"{source.stem}.{label}-{precision}.plan")


def build_plan(
    source: Path,
    plan: Path | None,
    precision: str,
    name: str = "auto",
    options: Options | None = None,
    calibration: Array | None = None,
) -> tuple[Path, dict[str, Any]]:
    """fp32 ONNX -> plan and the sidecar `PLAN.json` beside it; returns both.

    `plan` None: `plan_path`.
    Raises UserError: not parsed, not built, int8 without images, an option the backend lacks; Unavailable as
    `exporters.trt.plan.backend`.
    """
    options = options or Options()
    name, trt = backend(name)
    build.validate_options(name, options)
    if precision == "int8" and calibration is None:
        raise UserError(int8.NO_CALIBRATION)
    start = time.perf_counter()
    proto = onnx_file.read_onnx(source)
    shape = onnx_file.classifier_input_shape(proto, source)
    plan = plan or plan_path(source, precision, name, options)
    make_parent(plan)
    with tempfile.TemporaryDirectory() as folder:
        graph = Path(folder) / source.name
        ranges = trained.beside(source)
        converted = quantize.at_precision(proto, precision, calibration, ranges)
        onnx_file.write_onnx(converted, graph)
        built = build.EngineBuilder(trt, graph, shape[1:], options).build()
    batch, cache = shape[0], options.timing_cache
    sidecar = {
        "schema": SCHEMA,
        "backend": name,
        "version": trt.__version__,
        "platform": system(),
        "gpu": vars(gpu) if (gpu := driver.device()) else None,
        "precision": precision,
        "tf32": False,
        "shapes": [batch] * 3 if batch else list(options.shapes),
        "input_shape": list(shape),
        "version_compatible": options.version_compatible,
        "hardware_compatible": options.hardware_compatible,
        "optimization_level": options.optimization_level,
        "timing_cache": cache.name if cache else None,
        "onnx": {
            "file": source.name,
            "sha256": artifacts.sha256(source),
            "opset": onnx_file.opset(proto),
        },
        "plan_sha256": hashlib.sha256(built).hexdigest(),
        "size_mb": len(built) / 1e6,
        "seconds": time.perf_counter() - start,
        "notes": {**onnx_file.read_metadata(converted), "precision": precision},
        "provenance": artifacts.provenance(
            {"precision": precision, "backend": name, "shapes": list(options.shapes)}, onnx=source
        ),
    }
    with atomic(plan) as temporary:
        temporary.write_bytes(built)
        artifacts.write_json(sidecar_path(plan), sidecar)
    return plan, sidecar
