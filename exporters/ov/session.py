"""OpenVINO as a session whose precision is requested and read back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from exporters.artifact.session import (
    PipelineErrors,
    import_package,
    validate_output,
    validated_shape,
)
from exporters.device import ov
from pipeline.core.errors import UserError

HINTS = {"bf16": "bf16", "default": None}  # of a precision; f32 of every other
# no telemetry, whoever imports openvino: it falls back to its own stub when the sender is absent
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
NOTES = "cakd"  # the branch of rt_info that holds the notes


def openvino_library() -> Any:
    """openvino. Raises Unavailable: not installed."""
    remedy = "`pip install '.[openvino]'`, without it ov-* targets are skipped"
    return import_package("openvino", "OpenVINO", remedy)


class OvSession(PipelineErrors, ov.OvModel):
    """OpenVINO on the CPU, one stream. `precision`: "fp32" and "int8" hint f32, "bf16" that, "default" nothing.

    With a folder `cache` it opens what was compiled there for this IR, CPU, OpenVINO and these options.
    """

    def __init__(self, path: Path, threads: int, precision: str, cache: Path | None = None) -> None:
        openvino = openvino_library()
        if not path.is_file() or not path.with_suffix(".bin").is_file():
            raise UserError(f"{path}: an IR is two files, .xml and .bin; one of them is missing")
        with path.open("rb") as f:
            if b"<net" not in f.read(4096):  # OpenVINO would try every other format it knows on it
                raise UserError(f"{path}: no <net>; expected the .xml of an OpenVINO IR")
        super().__init__(openvino, path, threads, cache, HINTS.get(precision, "f32"))
        with self.refusals():
            model = ov.shared_core(openvino).read_model(path)
        if len(model.inputs) != 1:
            raise UserError(f"{path}: has {len(model.inputs)} inputs; allowed: one image input")
        self.metadata: Mapping[str, str] = _notes(model)
        self.input_shape = validated_shape(_dims(model.inputs[0], path), self.metadata, path)
        made = model.outputs[0]
        kind = made.element_type.to_string()
        validate_output(kind, _dims(made, path), self.input_shape, path)

    @cached_property
    def precision_effective(self) -> str:
        """What most convolutions and matrix products of the compiled graph run in."""
        return self.computes_in()


def _dims(port: Any, path: Path) -> list[int | None]:
    """The declared shape, None where it is free. Raises UserError: not even its rank is declared."""
    shape = port.partial_shape
    if shape.rank.is_dynamic:
        raise UserError(f"{path}: {port.node.friendly_name} has no declared shape; export it again")
    return [d.get_length() if d.is_static else None for d in shape]


def _notes(model: Any) -> dict[str, str]:
    """The notes of `exporters.artifact.metadata` in rt_info; empty in an IR made by another tool."""
    held = model.get_rt_info([NOTES]).value if model.has_rt_info([NOTES]) else {}
    return {key: str(value) for key, value in held.items()} if isinstance(held, dict) else {}
