"""A TensorRT engine behind the session interface: torch CUDA tensors, its own stream, a CUDA graph a batch size.

CAKD_CUDA_GRAPH=0, or `cuda_graph=False`, runs the engine without graphs.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from exporters.artifact.session import Array, Unavailable
from exporters.device.trt import logger
from exporters.trt.plan import MODULES, backend, command, obstacle, read_sidecar
from pipeline.core.errors import UserError

SWITCH = "CAKD_CUDA_GRAPH"


def graphs_wanted() -> bool:
    """What CAKD_CUDA_GRAPH says: 1, the default, or 0. Raises UserError on anything else."""
    if (text := os.environ.get(SWITCH, "1")) not in ("0", "1"):
        raise UserError(f"{SWITCH}: got {text!r}; allowed: 0, 1")
    return text == "1"


@dataclass(frozen=True)
class Lane:
    """What one batch size runs on: a context of its own, fixed buffers, and the graph captured over them."""

    context: Any
    taken: Any  # (B, C, H, W) float32 on the device
    made: dict[str, Any]  # output name -> tensor on the device
    graph: Any | None


class TrtSession:
    """An engine over torch CUDA tensors on its own stream; the copies in and out are part of `run`.

    Full TensorRT is captured here, after one run a batch size; TensorRT-RTX captures by itself, because only
    it knows when the kernels of a shape are compiled.
    """

    def __init__(self, plan: Path, cuda_graph: bool | None = None) -> None:
        sidecar = read_sidecar(plan)
        if reason := obstacle(sidecar, plan):
            raise Unavailable(reason)
        try:
            import torch
        except ImportError as error:
            raise Unavailable(f"engines run over torch CUDA tensors: {error}") from None
        name, trt = backend(sidecar["backend"])
        graphs = graphs_wanted() if cuda_graph is None else cuda_graph
        self._plan, self._trt, self._torch, self._log = plan, trt, torch, logger(trt)
        self._own, self._captured = name == "rtx" and graphs, name == "tensorrt" and graphs
        self._engine = self._deserialized(sidecar)
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {n: self._engine.get_tensor_mode(n) for n in names}
        self._inputs = [n for n in names if modes[n] == trt.TensorIOMode.INPUT]
        self._outputs = [n for n in names if modes[n] == trt.TensorIOMode.OUTPUT]
        if len(self._inputs) != 1 or not self._outputs:
            raise UserError(
                f"{plan}: has inputs {self._inputs} and outputs {self._outputs}; allowed: one image input"
            )
        self._stream = torch.cuda.Stream()
        self._lanes: dict[int, Lane] = {}
        self._shapes = sidecar["shapes"]
        self.runtime = f"{MODULES[name]} {trt.__version__}{', CUDA graph' if graphs else ''}"
        self.precision_effective = str(sidecar["precision"])  # strongly typed: as the graph says
        self.metadata: Mapping[str, str] = sidecar["notes"]
        b, c, h, w = sidecar["input_shape"]
        self.input_shape: tuple[int | None, int, int, int] = (b, c, h, w)

    def _deserialized(self, sidecar: Mapping[str, Any]) -> Any:
        runtime = self._trt.Runtime(self._log)
        if sidecar["version_compatible"]:  # such a plan brings the lean runtime of its version
            runtime.engine_host_code_allowed = True
        loaded = runtime.deserialize_cuda_engine(self._plan.read_bytes())
        if loaded is None:
            raise UserError(
                f"{self._plan}: the engine does not load: {self._log.told()}; "
                f"build it again: {command(sidecar, self._plan)}"
            )
        self._runtime = runtime
        return loaded

    def run(self, x: Array) -> Array:
        """x (B, 3, S, S) float32 -> the first output, (B, K) float32; above the plan's largest batch in parts.

        Raises UserError: B below the plan's smallest batch, or the engine fails.
        """
        most = self._shapes[2]
        if len(x) > most:
            return np.concatenate([self.run(x[i : i + most]) for i in range(0, len(x), most)])
        with self._torch.cuda.stream(self._stream):
            lane = self._lanes.get(len(x)) or self._lane(len(x))
            lane.taken.copy_(self._torch.from_numpy(x), non_blocking=True)
            if lane.graph is None:
                self._enqueue(lane.context)
            else:
                lane.graph.replay()
            logits: Array = lane.made[self._outputs[0]].float().cpu().numpy()
        return logits

    def _lane(self, batch: int) -> Lane:
        """Bind and run one batch size, then capture it: a graph keeps the context's shapes and the addresses.

        Hence a context a graph (TensorRT documentation, performance: CUDA graphs). The first run after a new
        shape does work that must not be captured.
        """
        torch, context = self._torch, self._context()
        shape = (batch, *self.input_shape[1:])
        if not context.set_input_shape(self._inputs[0], shape):
            raise UserError(f"{self._plan}: batch {batch}: the plan takes {self._shapes}")
        taken = torch.empty(shape, dtype=torch.float32, device="cuda")
        made = {name: self._output(context, name) for name in self._outputs}
        for name, tensor in {self._inputs[0]: taken, **made}.items():
            if not context.set_tensor_address(name, tensor.data_ptr()):
                raise UserError(f"{self._plan}: {name} cannot be bound: {self._log.told()}")
        taken.zero_()
        self._enqueue(context)
        self._stream.synchronize()
        graph = torch.cuda.CUDAGraph() if self._captured else None
        if graph is not None:
            try:
                with torch.cuda.graph(graph, stream=self._stream):
                    self._enqueue(context)
            except RuntimeError as error:
                raise UserError(
                    f"{self._plan}: no CUDA graph of it: {error}; run it with {SWITCH}=0"
                ) from None
        self._lanes[batch] = Lane(context, taken, made, graph)
        return self._lanes[batch]

    def _context(self) -> Any:
        if self._own:
            config = self._engine.create_runtime_config()
            if config is None:
                raise UserError(f"{self._plan}: no runtime configuration: {self._log.told()}")
            config.cuda_graph_strategy = self._trt.CudaGraphStrategy.WHOLE_GRAPH_CAPTURE
            context = self._engine.create_execution_context(config)
        else:
            context = self._engine.create_execution_context()
        if context is None:
            raise UserError(f"{self._plan}: no execution context: {self._log.told()}")
        return context

    def _output(self, context: Any, name: str) -> Any:
        torch, kind = self._torch, self._engine.get_tensor_dtype(name)
        kinds = {
            self._trt.DataType.FLOAT: torch.float32,
            self._trt.DataType.HALF: torch.float16,
            self._trt.DataType.INT32: torch.int32,
            self._trt.DataType.INT64: torch.int64,
            self._trt.DataType.BOOL: torch.bool,
        }
        shape = tuple(context.get_tensor_shape(name))
        if kind not in kinds or min(shape, default=0) < 0:
            raise UserError(
                f"{self._plan}: output {name} is {kind} {shape}; allowed: a fixed shape"
            )
        return torch.empty(shape, dtype=kinds[kind], device="cuda")

    def _enqueue(self, context: Any) -> None:
        if not context.execute_async_v3(self._stream.cuda_stream):
            raise UserError(f"{self._plan}: the engine failed to run: {self._log.told()}")
