"""One interface over every runtime: open an artefact, run float32 NCHW in, logits out, say what really ran."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporters.artifact.metadata import check, image_size
from pipeline.core.errors import UserError

Array = NDArray[np.float32]
CHANNELS = 3
MAX_INPUT_VALUES = 1 << 27  # values of one batch: 0.5 GB


class Session(Protocol):
    """An artefact loaded in its runtime, ready to run."""

    @property
    def runtime(self) -> str:
        """Name and version, as shown in reports: `onnxruntime 1.32.0`."""
        ...

    @property
    def precision_effective(self) -> str:
        """What the runtime reports it computes in: fp32, fp16, bf16, int8. May cost a load and a run."""
        ...

    @property
    def input_shape(self) -> tuple[int | None, int, int, int]:
        """(B, 3, S, S) as the artefact declares it; B is None where the batch is free."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The flat notes of `exporters.artifact.metadata`; empty in a file that carries none."""
        ...

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> logits (B, K) float32. The result does not alias a runtime buffer."""
        ...


@dataclass(frozen=True)
class Target:
    """One column of the latency report: a runtime and a precision."""

    name: str
    runtime: str  # of exporters.open.RUNTIMES
    precision: str  # "fp32" | "fp16" | "bf16" | "int8" | "default"
    artefact: str  # the file in its build folder

    def reads(self, artefact: Path) -> bool:
        """Whether its runtime takes this kind of file."""
        return artefact.suffix == Path(self.artefact).suffix


class PipelineErrors:
    """Mixin in front of a class of exporters.device: it raises the pipeline's own UserError."""

    name: str

    def error(self, what: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {what}")


class Unavailable(UserError):
    """This target cannot run here (package missing, no device); the text is the reason shown in its row."""


def import_package(package: str, name: str, remedy: str) -> Any:
    """A runtime's package. Raises Unavailable: not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{name} is missing ({error}); {remedy}") from None


TARGETS: dict[str, Target] = {
    t.name: t
    for t in (
        Target("torch-eager", "torch-eager", "fp32", "{model}.safetensors"),
        Target("torch-compile", "torch-compile", "fp32", "{model}.safetensors"),
        Target("ort-fp32", "ort", "fp32", "{model}.onnx"),
        Target("ort-int8", "ort", "int8", "{model}-int8.onnx"),
        Target("ov-fp32", "ov", "fp32", "{model}.xml"),
        Target("ov-bf16", "ov", "bf16", "{model}.xml"),
        Target("ov-default", "ov", "default", "{model}.xml"),
        Target("ov-int8", "ov", "int8", "{model}-int8.xml"),
        Target("rtx-fp32", "rtx", "fp32", "{model}.plan"),
        Target("rtx-fp16", "rtx", "fp16", "{model}.plan"),
        Target("trt-fp32", "trt", "fp32", "{model}.plan"),
        Target("trt-fp16", "trt", "fp16", "{model}.plan"),
        Target("trt-int8", "trt", "int8", "{model}.plan"),
    )
}


def validated_shape(
    dims: Sequence[int | None], notes: Mapping[str, str], path: Path
) -> tuple[int | None, int, int, int]:
    """The declared input -> (B or None, 3, H, W); a free height or width is the notes' image_size.

    Raises UserError: not four dimensions, channels that are not 3, a free size that nothing fixes or one that is
    not the notes', more values than LARGEST, notes that cannot be meant (`metadata.check`).
    """
    if len(dims) != 4:
        raise UserError(
            f"{path}: input has shape {list(dims)}; allowed: one image input (B, 3, H, W)"
        )
    try:
        check(notes)
        size = image_size(notes)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    channels, height, width = dims[1], dims[2] or size, dims[3] or size
    if channels is None or height is None or width is None:
        raise UserError(
            f"{path}: input shape {list(dims)} is free beyond the batch and its metadata holds no "
            "image_size; export it with a fixed size"
        )
    if channels != CHANNELS:
        raise UserError(
            f"{path}: input shape {list(dims)} has {channels} channels; allowed: {CHANNELS}, in front of "
            "height and width"
        )
    if min(1 if dims[0] is None else dims[0], height, width) < 1:
        raise UserError(f"{path}: input shape {list(dims)}; allowed: 1 or more of each")
    if (values := (dims[0] or 1) * channels * height * width) > MAX_INPUT_VALUES:
        raise UserError(
            f"{path}: input shape {list(dims)} holds {values:,} values; allowed: {MAX_INPUT_VALUES:,} at most"
        )
    if size and (height, width) != (size, size):
        raise UserError(
            f"{path}: input is {height}x{width}, its metadata says image_size {size}; export it again"
        )
    return (dims[0], channels, height, width)


def validate_output(
    kind: str, dims: Sequence[int | None], taken: tuple[int | None, int, int, int], path: Path
) -> None:
    """The declared first output: floating logits with a row an image, (B, K) or (B, K, 1, 1).

    `kind` as the runtime names it: `tensor(float)`, `f32`.
    Raises UserError: another type, a first dimension that is not the batch.
    """
    batch = taken[0]
    if not re.fullmatch(r"tensor\((float|float16|double|bfloat16)\)|b?f(16|32|64)", kind):
        raise UserError(f"{path}: the first output is {kind}; allowed: floating logits")
    if len(dims) < 2 or (dims[0] is not None and dims[0] != batch):
        raise UserError(
            f"{path}: the first output has shape {list(dims)} for a batch of {batch or 'any size'}; "
            "allowed: a row an image, (B, K)"
        )
