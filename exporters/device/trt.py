"""TensorRT 10.3 and later: the engine is built on its own GPU, cached, and run over libcudart."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

from . import compiled_cache
from .builder import BATCHES, Builder, logger
from .cudart import Cuda
from .engine import Engine

SCHEMA = "cakd.bundle-plan/2"


class TrtModel(Engine):
    """The engine of one ONNX file; all batches run over the same buffers."""

    def __init__(self, module: Any, model: Path, precision: str, cache: Path) -> None:
        super().__init__(module, logger(module), Cuda(), model.name)
        # Strongly typed: TensorRT computes in the types of the graph.
        self._precision = precision
        self.runtime = f"tensorrt {module.__version__}"
        plan, self.build_seconds = self._plan(model, cache)
        self.load(plan, (BATCHES[0], BATCHES[2]), f"empty {cache}, run again")

    def computes_in(self) -> str:
        """The precision of the graph."""
        return self._precision

    def _plan(self, model: Path, cache: Path) -> tuple[bytes, float | None]:
        """(The engine, seconds of its build): cached by the same TensorRT, GPU and file, or built."""
        gpu = self._cuda.device()
        key = {
            "schema": SCHEMA,
            "tensorrt": self._trt.__version__,
            **gpu,
            "batches": list(BATCHES),
            "onnx_sha256": hashlib.sha256(model.read_bytes()).hexdigest(),
        }
        path = cache / f"{model.stem}.trt{self._trt.__version__}-sm{gpu['sm']}.plan"
        cached = compiled_cache.read_cached(path, key)
        if cached is not None:
            return cached, None
        print(f"building the engine of {model.name}, once; it may take minutes", file=sys.stderr)
        began = time.perf_counter()
        plan = Builder(self._trt, model).build()
        seconds = time.perf_counter() - began
        compiled_cache.write_cached(path, plan, key)
        return plan, seconds
