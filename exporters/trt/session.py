"""A TensorRT plan behind the session interface, run over libcudart.

CAKD_CUDA_GRAPH=0, or `cuda_graph=False`, runs the engine without graphs.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from exporters.artifact.placement import Node, placement, unplaced
from exporters.artifact.session import Array, PipelineErrors, Unavailable
from exporters.device import cudart
from exporters.device.builder import logger
from exporters.device.engine import BoundContext, Engine
from exporters.trt.plan import MODULES, backend, command, obstacle, read_sidecar
from pipeline.core.errors import UserError

GRAPH_VARIABLE = "CAKD_CUDA_GRAPH"
# In a format of the engine inspector: "Row major linear FP16 format", "Half", "Int8 NCHW".
WORDS = {"int8": "int8", "bf16": "bf16|bfloat16", "fp16": "fp16|half", "fp32": "fp32|float"}


def cuda_graphs_enabled() -> bool:
    """The value of CAKD_CUDA_GRAPH: 1 (default) or 0. Raises UserError on anything else."""
    if (text := os.environ.get(GRAPH_VARIABLE, "1")) not in ("0", "1"):
        raise UserError(f"{GRAPH_VARIABLE}: got {text!r}; expected 0 or 1")
    return text == "1"


class PlanCuda(PipelineErrors, cudart.Cuda):
    """The CUDA runtime whose errors name the plan. Raises Unavailable: no library, no driver, no device."""

    def __init__(self, plan: Path) -> None:
        self.name = str(plan)
        try:
            super().__init__()
        except UserError as error:
            raise Unavailable(str(error)) from None


class TrtSession(PipelineErrors, Engine):
    """An engine with a context and fixed buffers per batch size; `run` includes the copies in and out.

    Full TensorRT is captured here, after one run a batch size (TensorRT documentation, performance: CUDA graphs);
    TensorRT-RTX captures by itself, because only it knows when the kernels of a shape are compiled.
    Raises Unavailable where the plan cannot run here, UserError where it is damaged or the engine fails.
    """

    def __init__(self, plan: Path, cuda_graph: bool | None = None) -> None:
        sidecar = read_sidecar(plan)
        if reason := obstacle(sidecar, plan):
            raise Unavailable(reason)
        name, trt = backend(sidecar["backend"])
        graphs = cuda_graphs_enabled() if cuda_graph is None else cuda_graph
        super().__init__(trt, logger(trt), PlanCuda(plan), str(plan))
        self.per_shape, self.captured = graphs, graphs and name == "tensorrt"
        smallest, _, largest = sidecar["shapes"]
        remedy = f"build it again: {command(sidecar, plan)}"
        self.load(plan.read_bytes(), (smallest, largest), remedy, sidecar["version_compatible"])
        self._began, self._ended = self._cuda.event(), self._cuda.event()
        self._engine_ms = 0.0
        self.runtime = f"{MODULES[name]} {trt.__version__}{', CUDA graph' if graphs else ''}"
        # Strongly typed: TensorRT computes in the types of the graph.
        self.precision_effective = str(sidecar["precision"])
        self.metadata: Mapping[str, str] = sidecar["notes"]
        b, c, h, w = sidecar["input_shape"]
        self.input_shape: tuple[int | None, int, int, int] = (b, c, h, w)

    def placement(self) -> dict[str, Any]:
        """The layers that the engine inspector lists, fused as they run, by the type of their first input."""
        inspector = self._engine.create_engine_inspector()
        if inspector is None:
            return unplaced(f"the engine inspector gives nothing: {self._log.text()}")
        # Without a context the types of a dynamic shape are unknown.
        inspector.execution_context = next(iter(self._bound.values())).context
        text = inspector.get_engine_information(self._trt.LayerInformationFormat.JSON)
        nodes: list[Node] = []
        with suppress(ValueError, KeyError, TypeError):
            nodes = [_node(layer) for layer in json.loads(text)["Layers"]]
        if not nodes:
            return unplaced("the engine inspector tells no types of layers; build the plan again")
        return placement("the engine inspector", nodes)

    def engine_ms(self) -> float:
        """GPU time in ms of the runs since the last call, by CUDA events, without the copies."""
        elapsed, self._engine_ms = self._engine_ms, 0.0
        return elapsed

    def _run(self, x: Array) -> Array:
        logits = super()._run(x)
        self._engine_ms += self._cuda.elapsed_ms(self._began, self._ended)
        return logits

    def _launch(self, bound: BoundContext) -> None:
        self._cuda.record(self._began, self._stream)
        super()._launch(bound)
        self._cuda.record(self._ended, self._stream)

    def _capture(self, bound: BoundContext) -> None:
        try:
            super()._capture(bound)
        except UserError as error:
            reason = str(error).removeprefix(f"{self.name}: ")
            raise self.error(
                f"no CUDA graph of it: {reason}; run it with {GRAPH_VARIABLE}=0"
            ) from None

    def _new_context(self, *config: Any) -> Any:
        if self.per_shape and not self.captured:
            runtime_config = self._engine.create_runtime_config()
            if runtime_config is None:
                raise self.call_failed("no runtime configuration")
            runtime_config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            config = (runtime_config,)
        return super()._new_context(*config)


def _node(layer: Mapping[str, Any]) -> Node:
    """A layer of the inspector's JSON. Raises KeyError, TypeError: one of a plan that holds its name only."""
    inputs = layer["Inputs"]
    kind = str(inputs[0]["Format/Datatype"]) if inputs else ""
    precision = next((p for p, words in WORDS.items() if re.search(words, kind, re.I)), None)
    return Node("GPU", str(layer["LayerType"]), precision)
