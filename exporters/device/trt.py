"""TensorRT 10.3 and later: the engine is built here, on its own GPU, kept beside, and run over libcudart."""

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
    """The engine of one ONNX file; every batch runs over the same buffers."""

    def __init__(self, module: Any, model: Path, precision: str, cache: Path) -> None:
        super().__init__(module, logger(module), Cuda(), model.name)
        self._precision = precision  # strongly typed: TensorRT computes what the graph says
        self.runtime = f"tensorrt {module.__version__}"
        plan, self.build_seconds = self._plan(model, cache)
        self.load(plan, (BATCHES[0], BATCHES[2]), f"empty {cache}, run again")

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
        known = compiled_cache.read_cached(path, maker)
        if known is not None:
            return known, None
        print(f"building the engine of {model.name}, once; it may take minutes", file=sys.stderr)
        began = time.perf_counter()
        plan = Builder(self._trt, model).build()
        seconds = time.perf_counter() - began
        compiled_cache.write_cached(path, plan, maker)
        return plan, seconds
