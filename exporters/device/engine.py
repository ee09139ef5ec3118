"""A TensorRT engine run over libcudart: execution contexts, device memory, CUDA graphs."""

from __future__ import annotations

import contextlib
import weakref
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .cudart import Cuda
from .errors import Named


class BoundContext:
    """An execution context, device memory for each of its tensors, and the input shape both are bound for."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.buffers: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self.shape: tuple[int, ...] = ()
        self.graph: int | None = None


class Engine(Named):
    """One engine on device 0 and a stream of its own; the copies to and from the device are part of `run`.

    Its device memory is given back when it goes, or with the process.
    """

    per_shape = (
        False  # a context for each input shape; else one, bound anew where the shape changes
    )
    captured = (
        False  # a CUDA graph for each shape, replayed; needs `per_shape`: it keeps the addresses
    )

    def __init__(self, module: Any, log: Any, cuda: Cuda, name: str) -> None:
        self._trt, self._log, self._cuda, self.name = module, log, cuda, name
        self._bound: dict[tuple[int, ...], BoundContext] = {}
        weakref.finalize(self, _free, cuda, self._bound)

    def refused(self, what: str, *remedy: str) -> Exception:
        """The exception of a call that gave nothing, in TensorRT's own words."""
        return self.error("; ".join([f"{what}: {self._log.told()}", *remedy]))

    def load(
        self, plan: bytes, batches: tuple[int, int], remedy: str, host_code: bool = False
    ) -> None:
        """Deserialize the plan; `batches` are the smallest and the largest that it takes, where its batch is free.

        host_code: the plan may bring code that the host executes. Raises `error`: it does not load, or
        takes anything but one float32 image.
        """
        trt = self._trt
        runtime = trt.Runtime(self._log)
        if host_code:
            runtime.engine_host_code_allowed = True
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.refused("the engine does not load", remedy)
        self._runtime = runtime
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        foreign = [n for n in inputs if self._engine.get_tensor_dtype(n) != trt.DataType.FLOAT]
        self._outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or foreign or not self._outputs:
            raise self.error(
                f"inputs {inputs}, not float32 {foreign}, outputs {self._outputs}; "
                "allowed: one float32 image input"
            )
        self._input = inputs[0]
        self._kinds = self._numpy_kinds(names)
        batch = int(self._engine.get_tensor_shape(self._input)[0])
        self._batches = batches if batch == -1 else (batch, batch)
        self._stream = self._cuda.stream()
        if not self.per_shape:
            self._bound[()] = BoundContext(self._new_context())

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K) float32; above the engine's largest batch in parts.

        Raises `error`: a batch below the engine's smallest, TensorRT or CUDA fails.
        """
        most = self._batches[1]
        if len(x) > most:
            return np.concatenate([self.run(x[i : i + most]) for i in range(0, len(x), most)])
        return self._run(np.ascontiguousarray(x, np.float32))

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        bound, output = self._bind(x), self._outputs[0]
        made = np.empty(tuple(bound.context.get_tensor_shape(output)), self._kinds[output])
        self._cuda.upload(bound.buffers[self._input][0], x, self._stream)
        self._play(bound)
        self._cuda.download(made, bound.buffers[output][0], self._stream)
        self._cuda.wait(self._stream)
        return made.astype(np.float32, copy=False)

    def _play(self, bound: BoundContext) -> None:
        """Queue one run over the buffers, by the graph where there is one."""
        if bound.graph is None:
            self._enqueue(bound)
        else:
            self._cuda.launch(bound.graph, self._stream)

    def _enqueue(self, bound: BoundContext) -> None:
        if not bound.context.execute_async_v3(self._stream):
            raise self.refused(f"batch {bound.shape[0]}: the engine failed to run")

    def _bind(self, x: NDArray[np.float32]) -> BoundContext:
        """The context for inputs of this shape, every tensor with device memory that holds it."""
        key = x.shape if self.per_shape else ()
        bound = self._bound.get(key) or BoundContext(self._new_context())
        if bound.shape != x.shape:
            bound.shape = ()
            self._allocate(bound, x.shape)
            bound.shape = x.shape
            if self.captured:  # the first run of a shape does work that must not be captured
                self._cuda.upload(bound.buffers[self._input][0], x, self._stream)
                self._enqueue(bound)
                self._cuda.wait(self._stream)
                self._capture(bound)
            self._bound[key] = bound
        return bound

    def _capture(self, bound: BoundContext) -> None:
        bound.graph = self._cuda.capture(self._stream, lambda: self._enqueue(bound))

    def _new_context(self, *config: Any) -> Any:
        context = self._engine.create_execution_context(*config)
        if context is None:
            raise self.refused("no execution context", "free device memory, run again")
        return context

    def _allocate(self, bound: BoundContext, shape: tuple[int, ...]) -> None:
        """Tell the context its input shape and give every tensor device memory; what is large enough stays."""
        context, (least, most) = bound.context, self._batches
        if not context.set_input_shape(self._input, shape):
            raise self.refused(
                f"batch {shape[0]}: TensorRT refuses {shape}, the engine takes batches of {least} to {most}"
            )
        for name in (self._input, *self._outputs):
            dims, kind = tuple(context.get_tensor_shape(name)), self._kinds[name]
            if kind is None or min(dims, default=0) < 0:
                got = self._engine.get_tensor_dtype(name)
                raise self.error(f"output {name} is {got} {dims}; allowed: a fixed shape")
            size = int(np.prod(dims)) * kind.itemsize
            address, held = bound.buffers.get(name, (0, 0))
            if size > held:
                if held:
                    self._cuda.free(address)
                address = self._cuda.allocate(size)
                bound.buffers[name] = (address, size)
            if not context.set_tensor_address(name, address):
                raise self.refused(f"{name}: TensorRT refuses its buffer")

    def _numpy_kinds(self, names: list[str]) -> dict[str, Any]:
        """The NumPy type of each tensor; None where there is none."""
        kinds = {
            self._trt.DataType.FLOAT: np.dtype(np.float32),
            self._trt.DataType.HALF: np.dtype(np.float16),
            self._trt.DataType.INT32: np.dtype(np.int32),
            self._trt.DataType.INT64: np.dtype(np.int64),
            self._trt.DataType.BOOL: np.dtype(np.bool_),
        }
        return {name: kinds.get(self._engine.get_tensor_dtype(name)) for name in names}


def _free(cuda: Cuda, bound: dict[tuple[int, ...], BoundContext]) -> None:
    with contextlib.suppress(Exception):  # the device may be what failed
        for one in bound.values():
            for address, _ in one.buffers.values():
                cuda.free(address)
