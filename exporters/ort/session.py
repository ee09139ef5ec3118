"""ONNX Runtime on the CPU as a session."""

from __future__ import annotations

import json
import tempfile
from collections import Counter
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from exporters.artifact import inputs
from exporters.artifact.session import Array, Unavailable, checked_output, checked_shape
from pipeline.core.errors import UserError


class OrtSession:
    """ONNX Runtime on the CPU."""

    def __init__(self, path: Path, threads: int) -> None:
        self._path = path
        self._session = open_file(path, threads)
        taken = self._session.get_inputs()
        if len(taken) != 1 or taken[0].type != "tensor(float)":
            listed = ", ".join(f"{i.name} {i.type}" for i in taken)
            raise UserError(f"{path}: inputs are {listed}; allowed: one float32 image input")
        self._input = taken[0].name
        self._output = self._session.get_outputs()[0].name
        self.runtime = f"onnxruntime {_library().__version__}"
        self.metadata: Mapping[str, str] = _notes(self._session, path)
        self.input_shape = checked_shape(_dims(taken[0]), self.metadata, path)
        made = self._session.get_outputs()[0]
        checked_output(made.type, _dims(made), self.input_shape, path)

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> the first output, (B, K) float32."""
        logits: Array = self._session.run([self._output], {self._input: x})[0]
        return logits

    @cached_property
    def precision_effective(self) -> str:
        """What most convolutions and matrix products take in, from a profile of one run in a second session."""
        with tempfile.TemporaryDirectory() as folder:
            session = open_file(self._path, 1, Path(folder) / "profile")
            x = inputs.smooth(self.input_shape[0] or 1, *self.input_shape[2:])
            session.run([self._output], {self._input: x})
            events = json.loads(Path(session.end_profiling()).read_text())
        kinds = Counter(
            _KINDS.get(next(iter(e["args"]["input_type_shape"][0])), "fp32")
            for e in events
            if any(word in e.get("args", {}).get("op_name", "") for word in _PRODUCTS)
            and e["args"].get("input_type_shape")
        )
        return kinds.most_common(1)[0][0] if kinds else "fp32"


_PRODUCTS = ("Conv", "Gemm", "MatMul", "Attention")
_KINDS = {"float": "fp32", "float16": "fp16", "bfloat16": "bf16", "uint8": "int8", "int8": "int8"}


def _library() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise Unavailable(f"ONNX Runtime is missing ({error}); `pip install onnxruntime`") from None
    return onnxruntime


def open_file(path: Path, threads: int, profile: Path | None = None) -> Any:
    """ONNX Runtime's own session on the CPU. Raises UserError: no such file, refused by ONNX Runtime."""
    ort = _library()
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an .onnx file")
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # an error is raised too
    if profile:
        options.enable_profiling = True
        options.profile_file_prefix = str(profile)
    try:
        return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # ONNX Runtime has one exception class per status code
        raise UserError(f"{path}: ONNX Runtime refuses it: {str(error)[:300]}") from None


def _notes(session: Any, path: Path) -> Mapping[str, str]:
    try:
        notes: Mapping[str, str] = session.get_modelmeta().custom_metadata_map
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: its metadata is not text ({error}); export it again") from None
    return notes


def _dims(value: Any) -> list[int | None]:
    return [d if isinstance(d, int) else None for d in value.shape]
