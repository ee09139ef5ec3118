"""A `tensorrt` and a `torch` of a machine with a GPU: they record what is asked and can be told to fail.

`Fake(fails={"build"})` makes that call give None, False or -1, as TensorRT does; what it logs is `fails`' name.
Engines are real files of four bytes; running one gives the image's mean plus the number of each of 4 classes.
"""

from __future__ import annotations

import contextlib
import enum
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from exporters.trt import driver

GPU = driver.Device("A GPU", "90", "13.0")
PLAN = b"FAKE"
LARGEST = 8  # images an engine takes at once
SUPPORTED = {"Conv", "Relu", "Gemm", "GlobalAveragePool", "Flatten", "ReduceMean", "Identity"}


class Severity(enum.IntEnum):
    INTERNAL_ERROR = 0
    ERROR = 1
    WARNING = 2


class ILogger:
    Severity = Severity


Flags = enum.IntEnum("Flags", ["TF32", "VERSION_COMPATIBLE"])
Level = enum.Enum("Level", ["NONE", "AMPERE_PLUS"])
Mode = enum.Enum("Mode", ["INPUT", "OUTPUT"])
Kind = enum.Enum("Kind", ["FLOAT", "HALF", "INT32", "INT64", "BOOL"])


class Fake:
    """Both modules, and `asked`: every call that matters, in order."""

    def __init__(self, version: str = "11.4.0.106", fails: frozenset[str] = frozenset()) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fails = set(fails)
        self.arrays: dict[int, np.ndarray[Any, Any]] = {}
        self.tensorrt = SimpleNamespace(
            __version__=version,
            ILogger=ILogger,
            BuilderFlag=Flags,
            HardwareCompatibilityLevel=Level,
            TensorIOMode=Mode,
            DataType=Kind,
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            Builder=lambda log: Builder(self, log),
            OnnxParser=lambda network, log: Parser(self, log),
            Runtime=lambda log: Runtime(self, log),
        )
        self.torch = FakeTorch(self)

    def gives(self, call: str, log: Any, value: Any, instead: Any = None) -> Any:
        """`value`, or `instead` and a logged error where that call is to fail."""
        self.asked.append((call,))
        if call not in self.fails:
            return value
        log.log(Severity.ERROR, f"{call} went wrong")
        return instead

    def count(self, call: str) -> int:
        return sum(entry[0] == call for entry in self.asked)


class Part:
    def __init__(self, fake: Fake, log: Any) -> None:
        self.fake, self._log = fake, log


class Builder(Part):
    def create_network(self, flags: int) -> Any:
        self.fake.asked.append(("flags", flags))
        return self.fake.gives("network", self._log, SimpleNamespace())

    def create_builder_config(self) -> Any:
        self.config = Config(self.fake, self._log)
        return self.fake.gives("config", self._log, self.config)

    def create_optimization_profile(self) -> Any:
        shaped = SimpleNamespace(set_shape=lambda *a: self.fake.asked.append(("profile", *a)))
        return self.fake.gives("create_profile", self._log, shaped)

    def build_serialized_network(self, network: Any, config: Any) -> Any:
        self.fake.asked.append(("settings", dict(vars(config.settings))))
        return self.fake.gives("build", self._log, PLAN)


class Config(Part):
    def __init__(self, fake: Fake, log: Any) -> None:
        super().__init__(fake, log)
        object.__setattr__(self, "settings", SimpleNamespace(flags={Flags.TF32}))
        self.cache: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("hardware_compatibility_level", "builder_optimization_level"):
            setattr(self.settings, name, value)
        else:
            super().__setattr__(name, value)

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        setattr(self.settings, pool, size)

    def clear_flag(self, flag: Any) -> None:
        self.settings.flags.discard(flag)

    def set_flag(self, flag: Any) -> None:
        self.settings.flags.add(flag)

    def add_optimization_profile(self, profile: Any) -> int:
        return int(self.fake.gives("add_profile", self._log, 0, -1))

    def create_timing_cache(self, blob: bytes) -> Any:
        self.fake.asked.append(("cache read", blob))
        serialize = lambda: self.fake.gives("serialize", self._log, blob + b"+")  # noqa: E731
        return self.fake.gives("create_cache", self._log, SimpleNamespace(serialize=serialize))

    def set_timing_cache(self, cache: Any, ignore_mismatch: bool) -> bool:
        self.fake.asked.append(("ignore mismatch", ignore_mismatch))
        self.cache = cache
        return bool(self.fake.gives("set_cache", self._log, True, False))

    def get_timing_cache(self) -> Any:
        return self.fake.gives("get_cache", self._log, self.cache)


class Parser(Part):
    """Knows SUPPORTED and finds every other node."""

    def __init__(self, fake: Fake, log: Any) -> None:
        super().__init__(fake, log)
        self.errors: list[Any] = []

    def _odd(self, model: onnx.ModelProto) -> list[Any]:
        odd = [n for n in enumerate(model.graph.node) if n[1].op_type not in SUPPORTED]
        return [
            SimpleNamespace(
                node=lambda i=i: i,
                node_name=lambda n=n: n.name,
                node_operator=lambda n=n: n.op_type,
                desc=lambda: "no importer",
            )
            for i, n in odd
        ]

    def parse_from_file(self, path: str) -> bool:
        self.errors = self._odd(onnx.load(path))
        if "model" in self.fake.fails:
            whole = SimpleNamespace(node=lambda: -1, desc=lambda: "the model went wrong")
            self.errors = [*self.errors, whole]
        return bool(self.fake.gives("parse", self._log, not self.errors, False))

    @property
    def num_errors(self) -> int:
        return len(self.errors)

    def get_error(self, i: int) -> Any:
        return self.errors[i]


class Runtime(Part):
    engine_host_code_allowed = False

    def deserialize_cuda_engine(self, data: bytes) -> Any:
        assert data == PLAN
        self.fake.asked.append(("host code", self.engine_host_code_allowed))
        return self.fake.gives("deserialize", self._log, Engine(self.fake, self._log))


class Engine(Part):
    """(B, 3, S, S) -> `logits` (B, 4) and a second output that must be bound too."""

    num_io_tensors = 3

    def get_tensor_name(self, i: int) -> str:
        return ("image", "logits", "index")[i]

    def get_tensor_mode(self, name: str) -> Any:
        return Mode.INPUT if name == "image" else Mode.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return Kind.INT64 if name == "index" else Kind.FLOAT

    def create_execution_context(self) -> Any:
        return self.fake.gives("context", self._log, Context(self.fake, self._log))


class Context(Part):
    shape: tuple[int, ...] = ()

    def __init__(self, fake: Fake, log: Any) -> None:
        super().__init__(fake, log)
        self.bound: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return bool(self.fake.gives("input_shape", self._log, shape[0] <= LARGEST, False))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return (self.shape[0], 4) if name == "logits" else (self.shape[0],)

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound[name] = address
        return bool(self.fake.gives("address", self._log, True, False))

    def execute_async_v3(self, stream: int) -> bool:
        if not self.fake.gives("execute", self._log, True, False):
            return False
        self.fake.torch.cuda.enqueued(self.compute)
        return True

    def compute(self) -> None:
        assert self.bound.keys() == {"image", "logits", "index"}
        taken = self.fake.arrays[self.bound["image"]]
        made = taken.mean(axis=(1, 2, 3))[:, None] + np.arange(4)
        self.fake.arrays[self.bound["logits"]][...] = made


class Tensor:
    """A torch tensor by its numpy array; the array is found again by its address."""

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def data_ptr(self) -> int:
        return int(self.array.ctypes.data)

    def zero_(self) -> None:
        self.array[...] = 0

    def copy_(self, other: Tensor, non_blocking: bool) -> None:
        self.array[...] = other.array

    def float(self) -> Tensor:
        return Tensor(self.array.astype(np.float32))

    def cpu(self) -> Tensor:
        return self

    def numpy(self) -> np.ndarray[Any, Any]:
        return self.array


class FakeTorch:
    float32, float16, int32, int64, bool = np.float32, np.float16, np.int32, np.int64, np.bool_

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.cuda = FakeCuda(fake)

    def empty(self, shape: tuple[int, ...], dtype: Any, device: str) -> Tensor:
        assert device == "cuda"
        tensor = Tensor(np.full(shape, 7, dtype))
        self.fake.arrays[tensor.data_ptr()] = tensor.array
        return tensor

    def from_numpy(self, array: np.ndarray[Any, Any]) -> Tensor:
        return Tensor(array)


class FakeCuda:
    """Work runs at once, but inside a capture it is kept for `replay`."""

    def __init__(self, fake: Fake) -> None:
        self.fake = fake
        self.capturing: list[Any] | None = None

    def Stream(self) -> Any:  # noqa: N802
        return SimpleNamespace(cuda_stream=1, synchronize=lambda: None)

    @contextlib.contextmanager
    def stream(self, stream: Any) -> Any:
        yield

    def CUDAGraph(self) -> Any:  # noqa: N802
        graph = SimpleNamespace(work=[])
        graph.replay = lambda: (
            self.fake.asked.append(("replay",)),
            [work() for work in graph.work],
        )
        return graph

    @contextlib.contextmanager
    def graph(self, graph: Any, stream: Any) -> Any:
        if "capture" in self.fake.fails:
            raise RuntimeError("operation not permitted when stream is capturing")
        self.fake.asked.append(("capture",))
        self.capturing = graph.work
        yield
        self.capturing = None

    def enqueued(self, work: Any) -> None:
        if self.capturing is None:
            work()
        else:
            self.capturing.append(work)
