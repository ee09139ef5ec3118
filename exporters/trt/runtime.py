"""TensorRT-RTX and full TensorRT as rows of the runtimes."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build, Runtime
from exporters.trt import convert, plan
from exporters.trt.build import Options
from exporters.trt.session import TrtSession


def _runtime(name: str, backend: str) -> Runtime:
    """Plans of one back end of `exporters.trt`; their sidecars say how to open them."""

    def make(precision: str, model: str, exported: Exported, out: Path, settings: Build) -> Path:
        """MODEL.plan and MODEL.plan.json in the folder `out`."""
        source, made = exported.folder / f"{model}.onnx", out / f"{model}.plan"
        options = Options(settings.trt_shapes)
        return convert.build_plan(source, made, precision, backend, options, exported.calibration)[
            0
        ]

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
