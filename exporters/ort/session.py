"""ONNX Runtime behind the session interface."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from exporters.artifact.placement import Node, placement
from exporters.artifact.session import (
    PipelineErrors,
    import_package,
    validate_inputs,
    validate_output,
    validated_shape,
)
from exporters.device import ort
from pipeline.core.errors import UserError


class OrtSession(PipelineErrors, ort.OrtModel):
    """An ONNX file in ONNX Runtime on the CPU. Raises Unavailable, UserError: missing, no float32 classifier."""

    def __init__(self, path: Path, threads: int, integer_kernels: bool = True) -> None:
        onnxruntime = onnxruntime_library()
        if not path.is_file():
            raise UserError(f"{path}: no such file; expected an .onnx file; check the path")
        super().__init__(onnxruntime, path, threads, integer_kernels)
        validate_inputs([(i.name, i.type) for i in self._session.get_inputs()], path)
        self.metadata: Mapping[str, str] = _metadata(self._session, path)
        self.input_shape = validated_shape(_dims(self._input), self.metadata, path)
        output = self._session.get_outputs()[0]
        validate_output(output.type, _dims(output), self.input_shape, path)

    @cached_property
    def _nodes(self) -> list[tuple[str, str, str | None]]:
        return self.profiled_nodes([self.input_shape[0] or 1, *self.input_shape[1:]])

    def precisions(self) -> dict[str, str | None]:
        """Name of each node as it was run -> its precision; a node that another one took over is missing."""
        return self.named_nodes([self.input_shape[0] or 1, *self.input_shape[1:]])

    @cached_property
    def precision_effective(self) -> str:
        """Precision of most convolutions and matrix products, from a profile of one run in a second session."""
        return ort.computes_in(self._nodes)

    def placement(self) -> dict[str, Any]:
        """The nodes of the same profile by execution provider and precision."""
        return placement("a profile of one run", itertools.starmap(Node, self._nodes))


def onnxruntime_library() -> Any:
    """Import onnxruntime. Raises Unavailable: not installed."""
    return import_package("onnxruntime", "ONNX Runtime", "`pip install onnxruntime`")


def _metadata(session: Any, path: Path) -> Mapping[str, str]:
    try:
        properties: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: metadata is not UTF-8 text ({error}); export it again") from None
    return properties


def _dims(value: Any) -> list[int | None]:
    return [d if isinstance(d, int) else None for d in value.shape]
