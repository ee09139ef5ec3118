"""Stands in for TensorRT 10.3 and libcudart: only names that 10.3 has, work done when the stream is waited for.

FAKE in the environment names the call that fails: a method, `dtype` (an fp16 border) or `driver`. An engine is its
ONNX file, run by ONNX Runtime; device memory is host memory that only the stand-in may touch. `Cudart` serves
tests/fake_tensorrt.py too.
"""

from __future__ import annotations

import ctypes
import enum
import functools
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

BROKEN = os.environ.get("FAKE", "")
DYNAMIC = -1
HANDLE = 0x7FFF_0000_1234  # a stream: wider than 32 bits, as on a real machine
COPY_MS, RUN_MS = 1.0, 0.25  # what events see


class Cudart:
    """libcudart, a call a method: what is queued is done when the stream is waited for, or recorded in a capture.

    `asked` gets ("capture",) and ("replay",); `fails` names the call that returns an error.
    """

    def __init__(self, fails: Any = (), asked: Any = None) -> None:
        self.fails, self.asked = fails, [] if asked is None else asked
        self.memory: dict[int, Any] = {}  # address -> buffer
        self.queue: list[Any] = []
        self.captured: Any = None  # what a capture has recorded so far
        self.graphs: dict[int, Any] = {}  # graphs, and executable graphs
        self.events: dict[int, Any] = {}  # when they happened, on a clock of ms
        self.now = 0.0

    def library(self) -> SimpleNamespace:
        """What `ctypes.CDLL` gives."""
        names = [name for name in dir(self) if name.startswith("cuda")]
        return SimpleNamespace(**{name: functools.partial(getattr(self, name)) for name in names})

    def enqueue(self, stream: int, work: Any, milliseconds: float = 0.0) -> int:
        def timed() -> None:
            work()
            self.now += milliseconds

        (self.queue if self.captured is None else self.captured).append(timed)
        return int(stream != HANDLE)

    def held(self, address: int, size: int) -> bool:
        """Whether so many bytes of device memory begin there."""
        return address in self.memory and size <= len(self.memory[address])

    def cudaGetDeviceCount(self, pointer: Any) -> int:
        pointer._obj.value = 0 if "no device" in self.fails else 1
        return 35 if "driver" in self.fails else 0

    def cudaDeviceGetAttribute(self, pointer: Any, number: int, device: int) -> int:
        minor = int(os.environ.get("FAKE_MINOR", "7"))
        pointer._obj.value = {16: 8, 75: 8, 76: minor}[number]
        return device

    def cudaMalloc(self, pointer: Any, size: int) -> int:
        if "cudaMalloc" in self.fails or self.captured is not None:
            return 2
        buffer = ctypes.create_string_buffer(b"\7" * size, size)
        pointer._obj.value = ctypes.addressof(buffer)
        self.memory[pointer._obj.value] = buffer
        return 0

    def cudaFree(self, address: int) -> int:
        return self.memory.pop(address) and 0

    def cudaMemcpyAsync(self, to: int, source: int, size: int, kind: int, stream: int) -> int:
        device, host = (to, source) if kind == 1 else (source, to)
        if kind not in (1, 2) or not self.held(device, size) or host in self.memory:
            return 1
        return self.enqueue(stream, lambda: ctypes.memmove(to, source, size), COPY_MS)

    def cudaStreamCreate(self, pointer: Any) -> int:
        pointer._obj.value = HANDLE
        return 0

    def cudaStreamSynchronize(self, stream: int) -> int:
        if self.captured is not None:
            return 900
        for work in self.queue:
            work()
        self.queue.clear()
        return int(stream != HANDLE)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> int:
        if self.captured is not None or self.queue or mode != 1:
            return 900
        self.asked.append(("capture",))
        self.captured = []
        return int(stream != HANDLE)

    def cudaStreamEndCapture(self, stream: int, pointer: Any) -> int:
        graph, self.captured = self.captured, None
        if "capture" in self.fails or stream != HANDLE:
            return 901
        pointer._obj.value = self._new(self.graphs, graph)
        return 0

    def cudaGraphInstantiateWithFlags(self, pointer: Any, graph: Any, flags: int) -> int:
        pointer._obj.value = self._new(self.graphs, list(self.graphs[graph.value]))
        return flags

    def cudaGraphDestroy(self, graph: Any) -> int:
        self.graphs.pop(graph.value).clear()
        return 0

    def cudaGraphLaunch(self, graph: int, stream: int) -> int:
        self.asked.append(("replay",))
        works = self.graphs[graph]
        return self.enqueue(stream, lambda: [work() for work in works])

    def cudaEventCreate(self, pointer: Any) -> int:
        pointer._obj.value = self._new(self.events, None)
        return 0

    def cudaEventRecord(self, event: int, stream: int) -> int:
        self.events[event] = None
        return self.enqueue(stream, lambda: self.events.update({event: self.now}))

    def cudaEventElapsedTime(self, pointer: Any, began: int, ended: int) -> int:
        if self.events[began] is None or self.events[ended] is None:
            return 600  # not ready
        pointer._obj.value = self.events[ended] - self.events[began]
        return 0

    def cudaGetErrorString(self, status: int) -> bytes:
        return f"words of {status}".encode()

    def _new(self, table: dict[int, Any], value: Any) -> int:
        """A handle of its own for the value."""
        handle = 0x7FFF_1000_0000 + len(self.graphs) + len(self.events) * 256
        while handle in self.graphs or handle in self.events:
            handle += 1
        table[handle] = value
        return handle


CUDA = Cudart((BROKEN,))


class Severity(enum.IntEnum):
    INTERNAL_ERROR, ERROR, WARNING = range(3)


class ILogger:
    Severity = Severity

    def fails(self, name: str) -> bool:
        if name == BROKEN:
            self.log(Severity.WARNING, "only a warning")  # type: ignore[attr-defined]
            self.log(Severity.ERROR, f"the log's\nwords on {name}")  # type: ignore[attr-defined]
        return name == BROKEN


class Config:
    def __init__(self, log: ILogger) -> None:
        self.log, self.profiles = log, []

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        assert (pool, size) == ("workspace", 1 << 30)

    def clear_flag(self, flag: str) -> None:
        assert flag == "tf32"

    def add_optimization_profile(self, profile: Any) -> int:
        self.profiles.append(profile.shapes)
        return -1 if self.log.fails("add_optimization_profile") else 0


class Profile:
    def set_shape(self, name: str, *shapes: tuple[int, ...]) -> None:
        self.name, self.shapes = name, shapes


class Network:
    """Filled by the parser."""

    def get_input(self, index: int) -> Any:
        return SimpleNamespace(name=self.name, shape=self.shape)


class Builder:
    def __init__(self, log: Any) -> None:
        if log.fails("Builder"):
            raise TypeError("pybind11::init(): factory function returned nullptr")
        self.log = log

    def create_network(self, flags: int) -> Network:
        assert flags == 1 << 1, "strongly typed"
        return Network()

    def create_builder_config(self) -> Config:
        return Config(self.log)

    def create_optimization_profile(self) -> Profile:
        return Profile()

    def build_serialized_network(self, network: Network, config: Config) -> bytes | None:
        assert len(config.profiles) == (network.shape[0] == DYNAMIC)
        return None if self.log.fails("build_serialized_network") else network.data


class OnnxParser:
    num_errors = 1

    def __init__(self, network: Network, log: Any) -> None:
        self.network, self.log = network, log

    def parse_from_file(self, path: str) -> bool:
        self.network.data = Path(path).read_bytes()
        session = _session(self.network.data)
        entry = session.get_inputs()[0]
        self.network.name = entry.name
        self.network.shape = tuple(d if isinstance(d, int) else DYNAMIC for d in entry.shape)
        return BROKEN != "parse_from_file"

    def get_error(self, index: int) -> Any:
        return SimpleNamespace(desc=lambda: "the parser's words on Frobnicate")


class Runtime:
    def __init__(self, log: Any) -> None:
        self.log = log

    def deserialize_cuda_engine(self, plan: bytes) -> Any:
        return None if self.log.fails("deserialize_cuda_engine") else Engine(plan, self.log)


class Engine:
    def __init__(self, plan: bytes, log: Any) -> None:
        self.session, self.log = _session(plan), log
        self.io = [*self.session.get_inputs(), *self.session.get_outputs()]
        self.num_io_tensors = len(self.io)

    def get_tensor_name(self, index: int) -> str:
        return str(self.io[index].name)

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name == self.io[0].name else "output"

    def get_tensor_dtype(self, name: str) -> str:
        return "half" if BROKEN == "dtype" else "float"

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        entry = next(e for e in self.io if e.name == name)
        return tuple(d if isinstance(d, int) else DYNAMIC for d in entry.shape)

    def create_execution_context(self) -> Any:
        return None if self.log.fails("create_execution_context") else Context(self)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine, self.log, self.addresses = engine, engine.log, {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = shape
        return not self.log.fails("set_input_shape") and 1 <= shape[0] <= 8

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        if self.engine.get_tensor_mode(name) == "input":
            return self.shape
        return (self.shape[0], *self.engine.get_tensor_shape(name)[1:])

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.addresses[name] = address
        return not self.log.fails("set_tensor_address") and address in CUDA.memory

    def execute_async_v3(self, stream: int) -> bool:
        assert len(self.addresses) == self.engine.num_io_tensors
        name, shape, addresses = self.engine.io[0].name, self.shape, dict(self.addresses)

        def work() -> None:
            data = ctypes.string_at(addresses[name], 4 * int(np.prod(shape)))
            x = np.frombuffer(data, np.float32).reshape(shape)
            for entry, made in zip(
                self.engine.io[1:], self.engine.session.run(None, {name: x}), strict=True
            ):
                assert CUDA.held(addresses[entry.name], made.nbytes)
                ctypes.memmove(addresses[entry.name], made.tobytes(), made.nbytes)

        assert CUDA.enqueue(stream, work, RUN_MS) == 0
        return not self.log.fails("execute_async_v3")


def _session(data: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    # A GPU's int8 sums are wide; the fused int8 kernels of an x86 CPU without VNNI saturate.
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def tensorrt() -> ModuleType:
    """What `import tensorrt` gives."""
    module = ModuleType("tensorrt")
    module.__dict__.update(
        __version__=os.environ.get("FAKE_VERSION", "10.3.0"),
        ILogger=ILogger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(TF32="tf32"),
        DataType=SimpleNamespace(
            FLOAT="float", HALF="half", INT32="int32", INT64="int64", BOOL="bool"
        ),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    )
    return module


def install() -> None:
    """Put both in the place of the real ones."""
    sys.modules["tensorrt"] = tensorrt()
    real = ctypes.CDLL

    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        return CUDA.library() if "cudart" in str(name) else real(name, *args, **kwargs)

    ctypes.CDLL = load  # type: ignore[assignment, misc]
