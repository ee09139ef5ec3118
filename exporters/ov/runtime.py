"""OpenVINO as a row of the runtimes."""

from __future__ import annotations

import tempfile
from pathlib import Path

from exporters.artifact.reference import Exported
from exporters.artifact.runtime import Build, Runtime
from exporters.ort import runtime as ort
from exporters.ov.convert import write_ir
from exporters.ov.session import OvSession


def make(precision: str, model: str, exported: Exported, out: Path, settings: Build) -> Path:
    """MODEL.xml or MODEL-int8.xml in the folder `out`, the weights beside it."""
    with tempfile.TemporaryDirectory() as folder:
        source = ort.make(precision, model, exported, Path(folder), settings)
        made = out / f"{source.stem}.xml"
        write_ir(source, made)
    return made


OV = Runtime("ov", ".xml", make, OvSession, packages=("openvino",))
