"""Stands in for TensorRT 10.3 and libcudart: only names that 10.3 has, work done when the stream is waited for.

FAKE in the environment names the call that fails: a method, `dtype` (an fp16 border) or `driver`. An engine is its
ONNX file, run by ONNX Runtime; device memory is host memory that only the stand-in may touch.
"""

from __future__ import annotations

import ctypes
import enum
import os
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np

BROKEN = os.environ.get("FAKE", "")
DYNAMIC = -1
MEMORY: dict[int, Any] = {}  # address -> buffer
QUEUE: list[Any] = []
HANDLE = 0x7FFF_0000_1234  # a stream: wider than 32 bits, as on a real machine


def _copy(to: int, source: int, size: int, kind: int, stream: int) -> int:
    device = to if kind == 1 else source
    if stream != HANDLE or device not in MEMORY or size > len(MEMORY[device]):
        return 1
    QUEUE.append(lambda: ctypes.memmove(to, source, size))
    return 0


def _malloc(pointer: Any, size: int) -> int:
    if BROKEN == "cudaMalloc":
        return 2
    buffer = ctypes.create_string_buffer(size)
    pointer._obj.value = ctypes.addressof(buffer)
    MEMORY[pointer._obj.value] = buffer
    return 0


def _set(value: int) -> Any:
    def call(pointer: Any, *_: int) -> int:
        pointer._obj.value = value
        return 0

    return call


def _attribute(pointer: Any, number: int, device: int) -> int:
    pointer._obj.value = {16: 8, 75: 8, 76: int(os.environ.get("FAKE_MINOR", "7"))}[number]
    return device


def _wait(stream: int) -> int:
    for work in QUEUE:
        work()
    QUEUE.clear()
    return stream != HANDLE


def _count(pointer: Any) -> int:
    pointer._obj.value = 0 if BROKEN == "no device" else 1
    return 35 if BROKEN == "driver" else 0


def cudart() -> SimpleNamespace:
    """What `ctypes.CDLL` gives for libcudart."""
    return SimpleNamespace(
        cudaGetDeviceCount=_count,
        cudaDeviceGetAttribute=_attribute,
        cudaMalloc=_malloc,
        cudaFree=lambda address: MEMORY.pop(address) and 0,
        cudaMemcpyAsync=_copy,
        cudaStreamCreate=_set(HANDLE),
        cudaStreamSynchronize=_wait,
        cudaGetErrorString=lambda status: f"words of {status}".encode(),
    )


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
        return "float16" if BROKEN == "dtype" else "float32"

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
        return not self.log.fails("set_tensor_address") and address in MEMORY

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == HANDLE and len(self.addresses) == self.engine.num_io_tensors
        name, shape = self.engine.io[0].name, self.shape

        def work() -> None:
            data = ctypes.string_at(self.addresses[name], 4 * int(np.prod(shape)))
            x = np.frombuffer(data, np.float32).reshape(shape)
            for entry, made in zip(
                self.engine.io[1:], self.engine.session.run(None, {name: x}), strict=True
            ):
                ctypes.memmove(self.addresses[entry.name], made.tobytes(), made.nbytes)

        QUEUE.append(work)
        return not self.log.fails("execute_async_v3")


def _session(data: bytes) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])


def tensorrt() -> ModuleType:
    """What `import tensorrt` gives."""
    module = ModuleType("tensorrt")
    module.__dict__.update(
        __version__=os.environ.get("FAKE_VERSION", "10.3.0"),
        float32="float32",
        ILogger=ILogger,
        Builder=Builder,
        OnnxParser=OnnxParser,
        Runtime=Runtime,
        NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
        MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
        BuilderFlag=SimpleNamespace(TF32="tf32"),
        TensorIOMode=SimpleNamespace(INPUT="input", OUTPUT="output"),
    )
    return module


def install() -> None:
    """Put both in the place of the real ones."""
    sys.modules["tensorrt"] = tensorrt()
    real = ctypes.CDLL

    def load(name: Any, *args: Any, **kwargs: Any) -> Any:
        return cudart() if "cudart" in str(name) else real(name, *args, **kwargs)

    ctypes.CDLL = load  # type: ignore[assignment, misc]
