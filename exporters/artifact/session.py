"""The session interface over every runtime (float32 NCHW in, logits out), and the table of targets."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import metadata
from pipeline.core.errors import UserError

Array = NDArray[np.float32]
CHANNELS = (1, 3)  # grey, RGB
# Values of one batch, 0.5 GB: a damaged or hostile shape must not make a runtime allocate the memory.
MAX_INPUT_VALUES = 1 << 27


class Session(Protocol):
    """An artefact loaded in its runtime, ready to run."""

    @property
    def runtime(self) -> str:
        """Name and version, as shown in reports: `onnxruntime 1.32.0`."""
        ...

    @property
    def precision_effective(self) -> str:
        """The precision the runtime reports it computes in: fp32, fp16, bf16, int8. May cost a load and a run."""
        ...

    @property
    def input_shape(self) -> tuple[int | None, int, int, int]:
        """(B, C, S, S) as the artefact declares it; B is None where the batch is dynamic."""
        ...

    @property
    def metadata(self) -> Mapping[str, str]:
        """The flat metadata of `exporters.artifact.metadata`; empty in a file that carries none."""
        ...

    def run(self, x: Array) -> Array:
        """x (B, C, S, S) float32 -> logits (B, K) float32. The result does not alias a runtime buffer."""
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
    """Mixin in front of a class of exporters.device, so that it raises the pipeline's own UserError."""

    name: str

    def error(self, message: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {message}")


class Unavailable(UserError):
    """A target that cannot run here (package missing, no device); the text is the reason shown in its row."""


def import_package(package: str, name: str, remedy: str) -> Any:
    """Import a runtime's package. Raises Unavailable: not installed."""
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise Unavailable(f"{name}: not installed ({error}); {remedy}") from None


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
        Target("rtx-int8", "rtx", "int8", "{model}.plan"),
        Target("trt-fp32", "trt", "fp32", "{model}.plan"),
        Target("trt-fp16", "trt", "fp16", "{model}.plan"),
        Target("trt-int8", "trt", "int8", "{model}.plan"),
    )
}


def validate_inputs(entries: Sequence[tuple[str, str]], path: Path) -> None:
    """Check the inputs of an ONNX file, given as (name, type). Raises UserError: not one float32 input."""
    if [kind for _, kind in entries] != ["tensor(float)"]:
        listed = ", ".join(f"{name} {kind}" for name, kind in entries)
        raise UserError(
            f"{path}: inputs: got {listed or 'none'}; expected one float32 image input; "
            "export a classifier that takes one float32 image batch"
        )


def validated_shape(
    dims: Sequence[int | None], properties: Mapping[str, str], path: Path
) -> tuple[int | None, int, int, int]:
    """The declared input -> (B or None, C, H, W); a dynamic height or width is the metadata's image_size.

    Raises UserError: not four dimensions, neither 1 nor 3 channels, a dynamic size without image_size or one that
    contradicts it, more than MAX_INPUT_VALUES values, invalid metadata (`metadata.check`).
    """
    try:
        metadata.check(properties)
        size = metadata.image_size(properties)
    except UserError as error:
        raise UserError(f"{path}: {error}") from None
    what = f"{path}: input shape: got {list(dims)}"
    if len(dims) != 4:
        raise UserError(
            f"{what}; expected (B, C, H, W); export a classifier that takes one image batch"
        )
    channels, height, width = dims[1], dims[2] or size, dims[3] or size
    if channels is None or height is None or width is None:
        axis = next(i for i, dim in enumerate((channels, height, width), 1) if dim is None)
        raise UserError(
            f"{path}: input axis {axis}: got a dynamic size in {list(dims)} and no image_size in the metadata; "
            "expected only the batch to be dynamic; pass --shape B,C,H,W for an ONNX file, or export it with "
            "fixed channels, height and width"
        )
    if channels not in CHANNELS:
        raise UserError(
            f"{what}, {channels} channels; expected 3 (RGB) or 1 (grey), in front of height and width; "
            "export the model as NCHW"
        )
    if min(1 if dims[0] is None else dims[0], height, width) < 1:
        raise UserError(f"{what}; expected 1 or more on every axis; export it again")
    if (values := (dims[0] or 1) * channels * height * width) > MAX_INPUT_VALUES:
        raise UserError(
            f"{what}, {values:,} values; expected {MAX_INPUT_VALUES:,} at most; export it with a smaller "
            "batch or image size"
        )
    if size and (height, width) != (size, size):
        raise UserError(
            f"{path}: input size: got {height}x{width} and metadata image_size {size}; expected the same; "
            "export it again"
        )
    return (dims[0], channels, height, width)


def validate_output(
    kind: str, dims: Sequence[int | None], input_shape: tuple[int | None, int, int, int], path: Path
) -> None:
    """Check the declared first output: floating-point logits, (B, K) or (B, K, 1, 1).

    `kind` as the runtime names it: `tensor(float)`, `f32`.
    Raises UserError: another type, a first dimension that is not the batch.
    """
    batch = input_shape[0]
    what = f"{path}: first output: got {kind} {list(dims)}"
    if not re.fullmatch(r"tensor\((float|float16|double|bfloat16)\)|b?f(16|32|64)", kind):
        raise UserError(f"{what}; expected floating-point logits; export them as the first output")
    if len(dims) < 2 or (dims[0] is not None and dims[0] != batch):
        raise UserError(
            f"{what} for a batch of {batch or 'any size'}; expected (B, classes), one row per image; "
            "export the logits as the first output"
        )
