"""OpenVINO as a session whose precision is requested and read back."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from exporters.artifact.placement import Node, placement
from exporters.artifact.session import (
    PipelineErrors,
    import_package,
    validate_output,
    validated_shape,
)
from exporters.device import ov
from pipeline.core.errors import UserError

# Precision -> OpenVINO's hint; the others get f32, without which the CPU may compute in bfloat16.
HINTS = {"bf16": "bf16", "default": None}
# No telemetry, whoever imports openvino: without the sender it falls back to its own stub.
sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
METADATA_BRANCH = "cakd"  # of rt_info
NOT_RUN = ("Const", "Input", "Output")  # nodes of the execution graph that only hold a tensor


def openvino_library() -> Any:
    """Import openvino. Raises Unavailable: not installed."""
    remedy = "`pip install '.[openvino]'`; without it ov-* targets are skipped"
    return import_package("openvino", "OpenVINO", remedy)


class OvSession(PipelineErrors, ov.OvModel):
    """An IR in OpenVINO on the CPU. `precision`: "fp32" and "int8" hint f32, "bf16" bf16, "default" nothing.

    With a folder `cache` it opens the model compiled there for this IR, CPU, OpenVINO and these options.
    Raises Unavailable: not installed; UserError: a file missing, not an IR, no image classifier.
    """

    def __init__(self, path: Path, threads: int, precision: str, cache: Path | None = None) -> None:
        openvino = openvino_library()
        if not path.is_file() or not path.with_suffix(".bin").is_file():
            raise UserError(
                f"{path}: an IR is two files, .xml and .bin; one of them is missing; convert it again"
            )
        with path.open("rb") as f:
            # OpenVINO would try every other format it knows on the file.
            if b"<net" not in f.read(4096):
                raise UserError(
                    f"{path}: no <net>; expected the .xml of an OpenVINO IR; convert it again"
                )
        super().__init__(openvino, path, threads, cache, HINTS.get(precision, "f32"))
        with self.translated_errors():
            model = ov.shared_core(openvino).read_model(path)
        if len(model.inputs) != 1:
            raise UserError(
                f"{path}: inputs: got {len(model.inputs)}; expected one image input; "
                "export a classifier that takes one image batch"
            )
        self.metadata: Mapping[str, str] = _metadata(model)
        self.input_shape = validated_shape(_dims(model.inputs[0], path), self.metadata, path)
        output = model.outputs[0]
        kind = output.element_type.to_string()
        validate_output(kind, _dims(output, path), self.input_shape, path)

    @cached_property
    def precision_effective(self) -> str:
        """Precision of most convolutions and matrix products of the compiled graph."""
        return self.computes_in()

    def placement(self) -> dict[str, Any]:
        """The nodes of the execution graph by precision, and which of them run in reference kernels."""
        nodes = ov.compiled_nodes(self._compiled)
        return placement("the execution graph", (_node(*n) for n in nodes if n[1] not in NOT_RUN))


def _node(kernel: str, layer: str, kind: str) -> Node:
    """A node of the execution graph; a reference kernel (`ref_any`) is plain C++, made for no CPU."""
    location = "CPU, reference kernel" if kernel.startswith("ref") else "CPU"
    return Node(location, layer, ov.PRECISION_OF_TYPE.get(kind))


def _dims(port: Any, path: Path) -> list[int | None]:
    """The declared shape, None where dynamic. Raises UserError: not even its rank is declared."""
    shape = port.partial_shape
    if shape.rank.is_dynamic:
        raise UserError(
            f"{path}: {port.node.friendly_name}: got a dynamic rank; expected a declared shape; export it again"
        )
    return [d.get_length() if d.is_static else None for d in shape]


def _metadata(model: Any) -> dict[str, str]:
    """The metadata in rt_info; empty in an IR of another tool."""
    branch = [METADATA_BRANCH]
    values = model.get_rt_info(branch).value if model.has_rt_info(branch) else {}
    return {key: str(value) for key, value in values.items()} if isinstance(values, dict) else {}
