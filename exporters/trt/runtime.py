"""The Runtime objects of TensorRT-RTX and full TensorRT."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build, Runtime
from exporters.trt import convert, plan
from exporters.trt.build import Options
from exporters.trt.session import TrtSession


def _runtime(name: str, backend: str) -> Runtime:
    """The Runtime of one backend of `exporters.trt`; a plan's sidecar says how to open it."""

    def make(precision: str, model: str, exported: Exported, out: Path, settings: Build) -> Path:
        """Write MODEL.plan and MODEL.plan.json into the folder `out`."""
        source, target = exported.folder / f"{model}.onnx", out / f"{model}.plan"
        options = Options(settings.trt_shapes)
        return convert.build_plan(
            source, target, precision, backend, options, exported.calibration
        )[0]

    return Runtime(
        name,
        ".plan",
        make,
        lambda artefact, *_: TrtSession(artefact),
        packages=(plan.MODULES[backend],),
        needs_gpu=True,
        obstacle=lambda artefact: plan.obstacle(plan.read_sidecar(artefact), artefact),
    )


RTX, TRT = _runtime("rtx", "rtx"), _runtime("trt", "tensorrt")
