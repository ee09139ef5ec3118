"""ONNX Runtime on the CPU as a session."""

from __future__ import annotations

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
from exporters.device import ort
from pipeline.core.errors import UserError


class OrtSession(PipelineErrors, ort.OrtModel):
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        onnxruntime = onnxruntime_library()
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected an .onnx file")
        super().__init__(onnxruntime, path, threads)
        taken = self._session.get_inputs()
        if len(taken) != 1 or taken[0].type != "tensor(float)":
            listed = ", ".join(f"{i.name} {i.type}" for i in taken)
            raise UserError(f"{path}: inputs are {listed}; allowed: one float32 image input")
        self.metadata: Mapping[str, str] = _notes(self._session, path)
        self.input_shape = validated_shape(_dims(taken[0]), self.metadata, path)
        made = self._session.get_outputs()[0]
        validate_output(made.type, _dims(made), self.input_shape, path)

    @cached_property
    def precision_effective(self) -> str:
        """What most convolutions and matrix products take in, from a profile of one run in a second session."""
        return self.computes_in([self.input_shape[0] or 1, *self.input_shape[1:]])


def onnxruntime_library() -> Any:
    """onnxruntime. Raises Unavailable: not installed."""
    return import_package("onnxruntime", "ONNX Runtime", "`pip install onnxruntime`")


def _notes(session: Any, path: Path) -> Mapping[str, str]:
    try:
        notes: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: its metadata is not text ({error}); export it again") from None
    return notes


def _dims(value: Any) -> list[int | None]:
    return [d if isinstance(d, int) else None for d in value.shape]
