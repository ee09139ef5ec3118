"""The Runtime object of OpenVINO."""

from __future__ import annotations

import tempfile
from pathlib import Path

from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build, Runtime
from exporters.ort import runtime as ort
from exporters.ov.convert import write_ir
from exporters.ov.session import OvSession


def make(precision: str, model: str, exported: Exported, out: Path, settings: Build) -> Path:
    """Write MODEL.xml or MODEL-int8.xml into the folder `out`, the weights beside it."""
    with tempfile.TemporaryDirectory() as folder:
        source = ort.make(precision, model, exported, Path(folder), settings)
        ir = out / f"{source.stem}.xml"
        write_ir(source, ir)
    return ir


OV = Runtime("ov", ".xml", make, OvSession, packages=("openvino",))
