"""A `tensorrt` and a libcudart of a machine with a GPU: they record what is asked and can be told to fail.

`Fake(fails={"build"})` makes that call give None, False or -1, as TensorRT does; what it logs is `fails`' name.
Engines are real files of four bytes; running one gives the image's mean plus the number of each of 4 classes.
"""

from __future__ import annotations

import ctypes
import enum
import json
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx

from exporters.device import cudart
from exporters.trt import driver
from tests.fake_jetson import RUN_MS, Cudart

GPU = driver.CudaDevice("A GPU", "90", "13.0")
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
Verbosity = enum.Enum("Verbosity", ["LAYER_NAMES_ONLY", "DETAILED"])
Kind = enum.Enum("Kind", ["FLOAT", "HALF", "INT32", "INT64", "BOOL"])


LAYERS = [  # operator, format of the first input once the shape is known
    ("Reformat", "Row major linear FP32"),
    ("CaskConvolution", "Channel major FP16 format where channel % 8 == 0"),
    ("CaskConvolution", "Half NHWC"),
    ("kgen", "Thirty-two wide channel vectorized row major Int8 format."),
    ("kgen", "BFloat16"),
    ("Shape", "Int64"),
]


class Fake:
    """Both, and `asked`: every call that matters, in order."""

    def __init__(self, version: str = "11.4.0.106", fails: frozenset[str] = frozenset()) -> None:
        self.asked: list[tuple[Any, ...]] = []
        self.fails = set(fails)
        self.cuda = Cudart(self.fails, self.asked)
        self.logits = np.dtype(np.float32)  # the type of the first output
        self.layers: Any = LAYERS  # of every engine, as its inspector lists them
        self.tensorrt = SimpleNamespace(
            __version__=version,
            ILogger=ILogger,
            BuilderFlag=Flags,
            HardwareCompatibilityLevel=Level,
            TensorIOMode=Mode,
            CudaGraphStrategy=SimpleNamespace(WHOLE_GRAPH_CAPTURE="whole graph"),
            DataType=Kind,
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            ProfilingVerbosity=Verbosity,
            LayerInformationFormat=SimpleNamespace(JSON="json"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="workspace"),
            Builder=lambda log: Builder(self, log),
            OnnxParser=lambda network, log: Parser(self, log, network),
            Runtime=lambda log: Runtime(self, log),
        )

    def install(self, monkeypatch: Any, gpu: driver.CudaDevice = GPU) -> None:
        """From here on the packages and the GPU of that machine."""
        for name in ("tensorrt", "tensorrt_rtx"):
            monkeypatch.setitem(sys.modules, name, self.tensorrt)
        monkeypatch.setattr(cudart, "_load", self.cuda.library)
        monkeypatch.setattr(driver, "device", lambda: gpu)

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


SETTINGS = ("hardware_compatibility_level", "builder_optimization_level", "profiling_verbosity")


class Config(Part):
    def __init__(self, fake: Fake, log: Any) -> None:
        super().__init__(fake, log)
        object.__setattr__(self, "settings", SimpleNamespace(flags={Flags.TF32}))
        self.cache: Any = None

    def __setattr__(self, name: str, value: Any) -> None:
        if name in SETTINGS:
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

    def __init__(self, fake: Fake, log: Any, network: Any) -> None:
        super().__init__(fake, log)
        self.errors: list[Any] = []
        self.network = network

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
        model = onnx.load(path)
        self.errors = self._odd(model)
        entry = model.graph.input[0]
        dims = [d.dim_value or -1 for d in entry.type.tensor_type.shape.dim]
        self.network.get_input = lambda _: SimpleNamespace(name=entry.name, shape=dims)
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
        half = name == "logits" and self.fake.logits == np.float16
        return Kind.INT64 if name == "index" else Kind.HALF if half else Kind.FLOAT

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"image": (-1, 3, 8, 8), "logits": (-1, 4), "index": (-1,)}[name]

    def create_engine_inspector(self) -> Any:
        return self.fake.gives("inspector", self._log, Inspector(self.fake, self._log))

    def create_runtime_config(self) -> Any:
        return self.fake.gives("runtime_config", self._log, SimpleNamespace())

    def create_execution_context(self, config: Any = None) -> Any:
        self.fake.asked.append(("strategy", getattr(config, "cuda_graph_strategy", None)))
        return self.fake.gives("context", self._log, Context(self.fake, self._log))


class Inspector(Part):
    """Tells formats of the shape that an execution context has."""

    execution_context: Any = None

    def get_engine_information(self, form: str) -> str:
        assert form == "json"
        layers = self.fake.layers
        if layers and isinstance(layers[0], tuple):
            known = self.execution_context is not None and self.execution_context.shape
            layers = [
                {"Name": f"{i}", "LayerType": kind, "Inputs": [{"Format/Datatype": text}]}
                for i, (kind, text) in enumerate(
                    (kind, text if known else "N/A due to dynamic shapes") for kind, text in layers
                )
            ]
        return json.dumps({"Layers": layers, "Bindings": ["image", "logits"]})


class Context(Part):
    shape: tuple[int, ...] = ()

    def __init__(self, fake: Fake, log: Any) -> None:
        super().__init__(fake, log)
        self.bound: dict[str, int] = {}

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        self.shape = tuple(shape)
        return bool(self.fake.gives("input_shape", self._log, shape[0] <= LARGEST, False))

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return {"image": self.shape, "logits": (self.shape[0], 4), "index": (self.shape[0],)}[name]

    def set_tensor_address(self, name: str, address: int) -> bool:
        self.bound[name] = address
        return bool(self.fake.gives("address", self._log, True, False))

    def execute_async_v3(self, stream: int) -> bool:
        """Queues the work over the shape and the addresses of now, as a captured graph keeps them."""
        cuda = self.fake.cuda
        doomed = cuda.captured is not None and "captured" in self.fake.fails
        if not self.fake.gives("captured" if doomed else "execute", self._log, True, False):
            return False
        shape, bound = self.shape, dict(self.bound)
        kind = self.fake.logits
        sizes = {"image": 4 * int(np.prod(shape)), "logits": 4 * shape[0] * kind.itemsize}
        sizes["index"] = 8 * shape[0]
        assert all(cuda.held(bound[name], size) for name, size in sizes.items())

        def compute() -> None:
            taken = np.frombuffer(ctypes.string_at(bound["image"], sizes["image"]), np.float32)
            means = taken.reshape(shape).mean(axis=(1, 2, 3))
            for name, made in (
                ("logits", (means[:, None] + np.arange(4)).astype(kind)),
                ("index", np.full(shape[0], -1, np.int64)),
            ):
                ctypes.memmove(bound[name], made.tobytes(), made.nbytes)

        return cuda.enqueue(stream, compute, RUN_MS) == 0
