"""ONNX file -> serialized engine: one strongly typed path for TensorRT 10.12+, 11 and TensorRT-RTX."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.artifact.session import PipelineErrors, Unavailable
from exporters.device.builder import BATCHES, Builder
from exporters.device.compiled_cache import sidecar_path
from exporters.trt import driver
from exporters.trt.plan import AMPERE
from pipeline.core import artifacts
from pipeline.core.atomic import atomic, make_parent
from pipeline.core.errors import UserError

LEVELS = range(6)  # builder_optimization_level; TensorRT's own default is 3
CACHE_SCHEMA = "cakd.timing/1"
# TensorRT-RTX documentation, inference-library: timing-cache-migration, engine-compatibility; its build with
# VERSION_COMPATIBLE ends for want of a lean runtime, and its plans are the same bytes at any level.
UNSUPPORTED_BY_RTX = {
    "timing_cache": "TensorRT-RTX times no kernels when it builds, and a cache would make it need a GPU",
    "version_compatible": "a TensorRT-RTX engine belongs to the release that built it",
    "hardware_compatible": "a TensorRT-RTX engine is compiled for the GPU that loads it",
    "optimization_level": "TensorRT-RTX times no kernels when it builds, so a level changes nothing",
}


@dataclass(frozen=True)
class Options:
    """Build options. `shapes`: smallest, usual and largest batch; None is TensorRT's own level."""

    shapes: tuple[int, int, int] = BATCHES
    version_compatible: bool = False
    hardware_compatible: bool = False
    optimization_level: int | None = None
    timing_cache: Path | None = None


def validate_options(name: str, options: Options) -> None:
    """Check the options before anything is built.

    Raises UserError: an option TensorRT-RTX lacks, a level out of range, AMPERE_PLUS on an older GPU.
    """
    level = options.optimization_level
    if level is not None and level not in LEVELS:
        raise UserError(f"--optimization-level: got {level}; expected 0 to {LEVELS[-1]}")
    if name == "rtx":
        for option, reason in UNSUPPORTED_BY_RTX.items():
            if getattr(options, option) not in (None, False):
                flag = f"--{option.replace('_', '-')}"
                raise UserError(f"{flag}: {reason}; leave it out, or use --backend tensorrt")
    gpu = driver.device()
    if options.hardware_compatible and gpu and int(gpu.sm) < AMPERE:
        raise UserError(
            f"--hardware-compatible: got {gpu.name}, SM {gpu.sm}; expected SM {AMPERE} (Ampere) or newer"
        )


class EngineBuilder(PipelineErrors, Builder):
    """The build of `exporters.device` with the options of TensorRT 10.12 and later, and a timing cache.

    image: (C, H, W) of the profile where the batch is free. Raises Unavailable: TensorRT cannot start.
    """

    def __init__(self, trt: Any, source: Path, image: Sequence[int], options: Options) -> None:
        super().__init__(trt, source, options.shapes, image)
        self._options = options

    def start_error(self, message: str) -> Exception:
        """The exception to raise where TensorRT itself does not start."""
        return Unavailable(message)

    def parse_errors(self, parser: Any) -> str:
        """Every unsupported node by operator and name, with the reason."""
        # The parser checks all nodes before it gives up (onnx-tensorrt, `parseGraph`). `supports_model_v2`, which
        # reports the same, crashes in TensorRT-RTX 1.7 on networks like these, and lists supported nodes too.
        nodes = {
            e.node(): f"{e.node_operator()} {e.node_name() or f'#{e.node()}'} ({e.desc()})"
            for e in map(parser.get_error, range(parser.num_errors))
            if e.node() >= 0
        }
        if not nodes:
            return super().parse_errors(parser)
        return f"{len(nodes)} of its nodes: {'; '.join(nodes.values())}"

    @contextmanager
    def configured(self, config: Any) -> Iterator[None]:
        """Apply the options to the build that runs inside the block."""
        trt, options = self._trt, self._options
        if options.version_compatible:
            config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if options.hardware_compatible:
            config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
        if options.optimization_level is not None:
            config.builder_optimization_level = options.optimization_level
        # The default keeps no more than the names of the layers, and `TrtSession.placement` needs their types.
        config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.timing_cache:
            _load_timing(trt, config, options.timing_cache, self._log)
        with super().configured(config):
            yield
        if options.timing_cache:
            _save_timing(trt, config, options.timing_cache, self._log)


def _load_timing(trt: Any, config: Any, path: Path, log: Any) -> None:
    """Load the timing cache into the config. Raises UserError: measured by another TensorRT or GPU."""
    # A cache belongs to the TensorRT and the device it was measured by (TensorRT documentation, performance:
    # builder-performance). A JSON beside ours names them; one without is for TensorRT to check.
    if path.exists() and not path.is_file():
        raise UserError(f"--timing-cache: got {path}, not a file; expected a file; name another")
    make_parent(path)
    sidecar = sidecar_path(path)
    if path.exists() and sidecar.exists():
        maker, here = artifacts.read_json(sidecar, CACHE_SCHEMA), _timed_by(trt)
        if maker != here:
            raise UserError(
                f"--timing-cache {path}: measured by {_describe(maker)}, here is "
                f"{_describe(here)}; name another file"
            )
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        reason = log.text() if log.errors else "measured by another version or device"
        raise UserError(f"--timing-cache {path}: TensorRT rejects it: {reason}; name another file")


def _save_timing(trt: Any, config: Any, path: Path, log: Any) -> None:
    cache = config.get_timing_cache()
    blob = None if cache is None else cache.serialize()
    if blob is None:
        raise UserError(
            f"--timing-cache {path}: TensorRT returned none: {log.text()}; leave --timing-cache out"
        )
    with atomic(path) as temporary:
        temporary.write_bytes(bytes(blob))
    artifacts.write_json(sidecar_path(path), _timed_by(trt))


def _timed_by(trt: Any) -> dict[str, Any]:
    gpu = driver.device()
    return {
        "schema": CACHE_SCHEMA,
        "version": trt.__version__,
        "gpu": gpu.name if gpu else None,
        "sm": gpu.sm if gpu else None,
        "driver": gpu.driver if gpu else None,
    }


def _describe(maker: Mapping[str, Any]) -> str:
    return (
        f"TensorRT {maker.get('version')} on {maker.get('gpu')}, driver CUDA {maker.get('driver')}"
    )


def parse_shapes(text: str) -> tuple[int, int, int]:
    """`1,1,8` -> smallest, usual, largest batch. Raises UserError: not three whole numbers in that order."""
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*){2}", text, re.ASCII):
        raise UserError(f"--shapes: got {text!r}; expected three batches like 1,1,8")
    smallest, usual, largest = (int(batch) for batch in text.split(","))
    if not 1 <= smallest <= usual <= largest:
        raise UserError(f"--shapes: got {text!r}; expected 1 <= smallest <= usual <= largest")
    return smallest, usual, largest
