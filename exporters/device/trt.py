"""TensorRT 10.3 and later: the engine is built here, on its own GPU, kept beside, and run over libcudart."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from . import kept
from .cudart import Cuda
from .errors import UserError

SCHEMA = "cakd.bundle-plan/2"
BATCHES = (1, 1, 8)  # smallest, usual and largest, where the model leaves the batch free
WORKSPACE = 1 << 30  # bytes, cut by TensorRT to what the device has


class TrtSession:
    """An engine and its buffers; the copies to and from the device are part of `run`."""

    def __init__(self, module: Any, model: Path, precision: str, cache: Path) -> None:
        self._trt, self._log, self._cuda = module, logger(module), Cuda()
        self._precision = precision  # strongly typed: TensorRT computes what the graph says
        self.runtime = f"tensorrt {module.__version__}"
        plan, self.build_seconds = self._plan(model, cache)
        self._runtime = module.Runtime(self._log)
        self._engine = self._runtime.deserialize_cuda_engine(plan)
        if self._engine is None:
            raise UserError(
                f"{model.name}: the engine does not load: {self._told()}; empty {cache}, run again"
            )
        self._context = self._engine.create_execution_context()
        if self._context is None:
            raise UserError(
                f"{model.name}: no execution context: {self._told()}; free device memory, run again"
            )
        self._input, self._outputs = self._tensors(model)
        batch = int(self._engine.get_tensor_shape(self._input)[0])
        self._batches = (BATCHES[0], BATCHES[2]) if batch == -1 else (batch, batch)
        self._stream = self._cuda.stream()
        self._buffers: dict[str, tuple[int, int]] = {}  # tensor -> address, bytes
        self._shape: tuple[int, ...] = ()

    def _told(self) -> str:
        return self._log.told() or "TensorRT said nothing"

    def _tensors(self, model: Path) -> tuple[str, list[str]]:
        """The one input and all outputs. Raises UserError: several inputs, or not float32 at the border."""
        engine, trt = self._engine, self._trt
        names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        inputs = [n for n in names if engine.get_tensor_mode(n) == trt.TensorIOMode.INPUT]
        foreign = [n for n in names if engine.get_tensor_dtype(n) != trt.float32]
        if len(inputs) != 1 or foreign:
            raise UserError(
                f"{model.name}: inputs {inputs}, not float32 {foreign}; allowed: one float32 image input"
            )
        return inputs[0], [n for n in names if n not in inputs]

    def run(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        """x (B, 3, H, W) -> the first output, (B, K); above the engine's largest batch in parts.

        Raises UserError: a batch below the engine's smallest, TensorRT or CUDA fails.
        """
        least, most = self._batches
        if len(x) > most:
            return np.concatenate([self.run(x[i : i + most]) for i in range(0, len(x), most)])
        x = np.ascontiguousarray(x, np.float32)
        if x.shape != self._shape:
            self._bind(x)
        made = np.empty(tuple(self._context.get_tensor_shape(self._outputs[0])), np.float32)
        self._cuda.upload(self._buffers[self._input][0], x, self._stream)
        if not self._context.execute_async_v3(self._stream):
            raise UserError(f"batch {len(x)}: the engine failed to run: {self._told()}")
        self._cuda.download(made, self._buffers[self._outputs[0]][0], self._stream)
        self._cuda.wait(self._stream)
        return made

    def _bind(self, x: NDArray[np.float32]) -> None:
        """Tell the context this input shape and give every tensor device memory that holds it."""
        context = self._context
        if not context.set_input_shape(self._input, x.shape):
            raise UserError(
                f"batch {len(x)}: TensorRT refuses {x.shape}, the engine takes batches of "
                f"{self._batches[0]} to {self._batches[1]}: {self._told()}"
            )
        for name in (self._input, *self._outputs):
            size = 4 * int(np.prod(tuple(context.get_tensor_shape(name))))
            address, held = self._buffers.get(name, (0, 0))
            if size > held:
                if held:
                    self._cuda.free(address)
                address = self._cuda.allocate(size)
                self._buffers[name] = (address, size)
            if not context.set_tensor_address(name, address):
                raise UserError(f"{name}: TensorRT refuses its buffer: {self._told()}")
        self._shape = x.shape

    def computes_in(self) -> str:
        """The precision of the graph."""
        return self._precision

    def _plan(self, model: Path, cache: Path) -> tuple[bytes, float | None]:
        """The engine's bytes, from the cache where it was made by this TensorRT on such a GPU from this file."""
        gpu = self._cuda.device()
        maker = {
            "schema": SCHEMA,
            "tensorrt": self._trt.__version__,
            **gpu,
            "batches": list(BATCHES),
            "onnx_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        }
        path = cache / f"{model.stem}.trt{self._trt.__version__}-sm{gpu['sm']}.plan"
        known = kept.load(path, maker)
        if known is not None:
            return known, None
        print(f"building the engine of {model.name}, once; it may take minutes", file=sys.stderr)
        began = time.perf_counter()
        plan = build(self._trt, self._log, model)
        seconds = time.perf_counter() - began
        kept.keep(path, plan, maker)
        return plan, seconds


def logger(trt: Any) -> Any:
    """A TensorRT logger that keeps the errors: TensorRT tells by them, and returns None."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the message that is raised, drops the rest."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def told(self) -> str:
            return "; ".join(self.errors[-3:])

    return Log()


def build(trt: Any, log: Any, model: Path) -> bytes:
    """ONNX file -> serialized engine, strongly typed: the precision is in the graph.

    Raises UserError with the parser's and the logger's own errors.
    """

    def refused(what: str, words: str = "") -> UserError:
        told = words or log.told() or "TensorRT said nothing"
        return UserError(f"{model.name}: {what}: {told}; try another --precision, or --runtime ort")

    try:
        builder = trt.Builder(log)
    except TypeError as error:  # the factory returned nothing: no driver, or one too old
        raise refused("TensorRT cannot start", log.told() or str(error)) from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    config = builder.create_builder_config()
    if network is None or config is None:
        raise refused("TensorRT gives no network to build")
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(model)):
        words = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise refused("TensorRT cannot parse it", " ".join(words.split())[:500])
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    entry = network.get_input(0)
    if entry is None:
        raise refused("the network has no input")
    if entry.shape[0] == -1:
        profile = builder.create_optimization_profile()
        if profile is None:
            raise refused("TensorRT gives no optimization profile")
        profile.set_shape(entry.name, *[(batch, *tuple(entry.shape)[1:]) for batch in BATCHES])
        if config.add_optimization_profile(profile) < 0:
            raise refused(f"TensorRT refuses the batches {list(BATCHES)}")
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise refused("TensorRT cannot build it")
    return bytes(plan)
