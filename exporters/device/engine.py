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
    """An execution context with device memory for each of its tensors, bound to one input shape."""

    def __init__(self, context: Any) -> None:
        self.context = context
        self.buffers: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self.shape: tuple[int, ...] = ()
        self.graph: int | None = None


class Engine(Named):
    """One engine on device 0 with a stream of its own; `run` includes the copies to and from the device."""

    # A context for each input shape; else one, which is bound again where the shape changes.
    per_shape = False
    # A CUDA graph for each shape, replayed. Needs `per_shape`: a graph holds the addresses it was captured with.
    captured = False

    def __init__(self, module: Any, log: Any, cuda: Cuda, name: str) -> None:
        self._trt, self._log, self._cuda, self.name = module, log, cuda, name
        self._bound: dict[tuple[int, ...], BoundContext] = {}
        # Not __del__: at interpreter exit that may run after ctypes is gone.
        weakref.finalize(self, _free, cuda, self._bound)

    def call_failed(self, what: str, *remedy: str) -> Exception:
        """The exception of a call that returned nothing, with TensorRT's own reason."""
        return self.error("; ".join([f"{what}: {self._log.text()}", *remedy]))

    def load(
        self, plan: bytes, batches: tuple[int, int], remedy: str, host_code: bool = False
    ) -> None:
        """Deserialize the plan; `batches` are the smallest and largest it takes, where its batch is dynamic.

        host_code: the plan may bring code that the host executes. Raises `error`: it does not load, or its
        input is not one float32 image batch.
        """
        trt = self._trt
        runtime = trt.Runtime(self._log)
        if host_code:
            runtime.engine_host_code_allowed = True
        self._engine = runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise self.call_failed("the engine does not load", remedy)
        self._runtime = runtime  # the engine uses it as long as it lives
        names = [self._engine.get_tensor_name(i) for i in range(self._engine.num_io_tensors)]
        modes = {name: self._engine.get_tensor_mode(name) for name in names}
        inputs = [name for name in names if modes[name] == trt.TensorIOMode.INPUT]
        foreign = [n for n in inputs if self._engine.get_tensor_dtype(n) != trt.DataType.FLOAT]
        self._outputs = [name for name in names if name not in inputs]
        if len(inputs) != 1 or foreign or not self._outputs:
            raise self.error(
                f"got inputs {inputs} (not float32: {foreign}), outputs {self._outputs}; "
                "expected one float32 image input; build it from such an ONNX"
            )
        self._input = inputs[0]
        self._dtypes = self._numpy_dtypes(names)
        batch = int(self._engine.get_tensor_shape(self._input)[0])
        self._batches = batches if batch == -1 else (batch, batch)
        self._stream = self._cuda.stream()
        if not self.per_shape:
            self._bound[()] = BoundContext(self._new_context())

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K) float32; more than the largest batch runs in chunks.

        Raises `error`: a batch below the engine's smallest, TensorRT or CUDA fails.
        """
        largest = self._batches[1]
        if len(x) > largest:
            chunks = (x[i : i + largest] for i in range(0, len(x), largest))
            return np.concatenate([self.run(chunk) for chunk in chunks])
        return self._run(np.ascontiguousarray(x, np.float32))

    def _run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        bound, output = self._bind(x), self._outputs[0]
        result = np.empty(tuple(bound.context.get_tensor_shape(output)), self._dtypes[output])
        self._cuda.upload(bound.buffers[self._input][0], x, self._stream)
        self._launch(bound)
        self._cuda.download(result, bound.buffers[output][0], self._stream)
        self._cuda.wait(self._stream)
        return result.astype(np.float32, copy=False)

    def _launch(self, bound: BoundContext) -> None:
        """Queue one run over the buffers, by replaying the graph where there is one."""
        if bound.graph is None:
            self._enqueue(bound)
        else:
            self._cuda.launch(bound.graph, self._stream)

    def _enqueue(self, bound: BoundContext) -> None:
        if not bound.context.execute_async_v3(self._stream):
            raise self.call_failed(f"batch {bound.shape[0]}: the engine failed to run")

    def _bind(self, x: NDArray[np.float32]) -> BoundContext:
        """The context for inputs of this shape, with device memory for every tensor."""
        key = x.shape if self.per_shape else ()
        bound = self._bound.get(key) or BoundContext(self._new_context())
        if bound.shape != x.shape:
            bound.shape = ()  # until all is bound: a failure in between must not look bound
            self._allocate(bound, x.shape)
            bound.shape = x.shape
            if self.captured:
                # The first run of a shape allocates and initialises, which cannot be captured (TensorRT
                # documentation, performance: CUDA graphs).
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
            raise self.call_failed("no execution context", "free device memory, run again")
        return context

    def _allocate(self, bound: BoundContext, shape: tuple[int, ...]) -> None:
        """Set the context's input shape and allocate every tensor; a buffer that is large enough stays."""
        context, (smallest, largest) = bound.context, self._batches
        if not context.set_input_shape(self._input, shape):
            raise self.call_failed(
                f"batch: got {shape[0]}; the engine takes {smallest} to {largest}; TensorRT rejects {shape}"
            )
        for name in (self._input, *self._outputs):
            dims, dtype = tuple(context.get_tensor_shape(name)), self._dtypes[name]
            if dtype is None or min(dims, default=0) < 0:
                got = f"{self._engine.get_tensor_dtype(name)} {dims}"
                raise self.error(f"output {name}: got {got}; expected a fixed shape; export it so")
            size = int(np.prod(dims)) * dtype.itemsize
            address, allocated = bound.buffers.get(name, (0, 0))
            if size > allocated:
                if allocated:
                    self._cuda.free(address)
                address = self._cuda.allocate(size)
                bound.buffers[name] = (address, size)
            if not context.set_tensor_address(name, address):
                raise self.call_failed(f"{name}: TensorRT rejects its buffer")

    def _numpy_dtypes(self, names: list[str]) -> dict[str, Any]:
        """The NumPy type of each tensor; None where there is none."""
        dtypes = {
            self._trt.DataType.FLOAT: np.dtype(np.float32),
            self._trt.DataType.HALF: np.dtype(np.float16),
            self._trt.DataType.INT32: np.dtype(np.int32),
            self._trt.DataType.INT64: np.dtype(np.int64),
            self._trt.DataType.BOOL: np.dtype(np.bool_),
        }
        return {name: dtypes.get(self._engine.get_tensor_dtype(name)) for name in names}


def _free(cuda: Cuda, bound: dict[tuple[int, ...], BoundContext]) -> None:
    with contextlib.suppress(Exception):  # the device may be what failed
        for entry in bound.values():
            for address, _ in entry.buffers.values():
                cuda.free(address)
