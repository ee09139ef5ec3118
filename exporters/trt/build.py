"""ONNX file -> serialized engine: one strongly typed path for TensorRT 10.12+, 11 and TensorRT-RTX.

The precision is in the graph. TensorRT logs its failures and returns None, False or -1: all are checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exporters.artifact.session import Unavailable
from exporters.device.trt import logger
from exporters.trt import driver
from exporters.trt.plan import AMPERE, sidecar_of
from pipeline.core import artifacts
from pipeline.core.atomic import atomic, make_parent
from pipeline.core.errors import UserError

SHAPES = (1, 1, 8)  # smallest, usual and largest batch
WORKSPACE = 1 << 30  # bytes
LEVELS = range(6)  # builder_optimization_level; TensorRT's own default is 3
CACHE_SCHEMA = "cakd.timing/1"
# TensorRT-RTX documentation, inference-library: timing-cache-migration, engine-compatibility; its build with
# VERSION_COMPATIBLE ends for want of a lean runtime, and its plans are the same bytes at any level.
NOT_OF_RTX = {
    "timing_cache": "TensorRT-RTX times nothing when it builds, and a cache would make it need a GPU",
    "version_compatible": "a TensorRT-RTX engine belongs to the release that built it",
    "hardware_compatible": "a TensorRT-RTX engine is compiled for the GPU that loads it",
    "optimization_level": "TensorRT-RTX times nothing when it builds: a level changes nothing",
}


@dataclass(frozen=True)
class Options:
    """How to build. `shapes`: the batches of the profile; None leaves TensorRT its own."""

    shapes: tuple[int, int, int] = SHAPES
    version_compatible: bool = False
    hardware_compatible: bool = False
    optimization_level: int | None = None
    timing_cache: Path | None = None


@dataclass(frozen=True)
class Entry:
    """The image input: its name and (B, C, H, W), B None where the batch is free."""

    name: str
    shape: tuple[int | None, int, int, int]


def check(name: str, options: Options) -> None:
    """Refuse what the backend lacks, before anything is built.

    Raises UserError: an option TensorRT-RTX has not, a level out of range, AMPERE_PLUS on an older GPU.
    """
    level = options.optimization_level
    if level is not None and level not in LEVELS:
        raise UserError(f"--optimization-level: got {level}; allowed: 0 to {LEVELS[-1]}")
    if name == "rtx":
        for option, why in NOT_OF_RTX.items():
            if getattr(options, option) not in (None, False):
                flag = f"--{option.replace('_', '-')}"
                raise UserError(f"{flag}: {why}; leave it out, or use --backend tensorrt")
    gpu = driver.device()
    if options.hardware_compatible and gpu and int(gpu.sm) < AMPERE:
        raise UserError(
            f"--hardware-compatible: got {gpu.name}, SM {gpu.sm}; allowed: SM {AMPERE} (Ampere) or newer"
        )


def build(trt: Any, source: Path, entry: Entry, options: Options) -> bytes:
    """ONNX file -> serialized engine; with `options.timing_cache` that file is read and written back.

    Raises UserError with the parser's and the logger's own errors; Unavailable: TensorRT cannot start.
    """
    log = logger(trt)
    try:
        builder = trt.Builder(log)
    except TypeError as error:  # "factory function returned nullptr": no driver, or one too old
        raise Unavailable(f"TensorRT cannot start: {log.told() or error}") from None
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    if network is None:
        raise UserError(f"{source.name}: TensorRT makes no network: {log.told()}")
    parser = trt.OnnxParser(network, log)
    if not parser.parse_from_file(str(source)):
        raise UserError(f"{source.name}: TensorRT cannot parse {_refused(parser, log)}")
    config = _configured(trt, builder, options, source, log)
    if entry.shape[0] is None:
        _add_profile(builder, config, entry, options.shapes, log)
    if options.timing_cache:
        _load_timing(trt, config, options.timing_cache, log)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UserError(f"{source.name}: TensorRT cannot build it: {log.told()}")
    if options.timing_cache:
        _save_timing(trt, config, options.timing_cache, log)
    return bytes(plan)


def _refused(parser: Any, log: Any) -> str:
    """Every node that is not supported, by operator and name, with the reason.

    The parser checks all nodes before it gives up (onnx-tensorrt, `parseGraph`). `supports_model_v2`, which tells
    the same, crashes in TensorRT-RTX 1.7 on networks like these, and its subgraphs hold sound nodes too.
    """
    found = [parser.get_error(i) for i in range(parser.num_errors)]
    of_nodes = {
        e.node(): f"{e.node_operator()} {e.node_name() or f'#{e.node()}'} ({e.desc()})"
        for e in found
        if e.node() >= 0
    }
    if of_nodes:
        return f"{len(of_nodes)} of its nodes: {'; '.join(of_nodes.values())}"
    return f"it: {'; '.join(e.desc() for e in found) or log.told()}"


def _configured(trt: Any, builder: Any, options: Options, source: Path, log: Any) -> Any:
    config = builder.create_builder_config()
    if config is None:
        raise UserError(f"{source.name}: TensorRT makes no configuration: {log.told()}")
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, WORKSPACE)
    config.clear_flag(trt.BuilderFlag.TF32)  # fp32 means fp32
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
    if options.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level
    return config


def _add_profile(builder: Any, config: Any, entry: Entry, shapes: Sequence[int], log: Any) -> None:
    profile = builder.create_optimization_profile()
    if profile is None:
        raise UserError(f"--shapes: TensorRT makes no profile for {list(shapes)}: {log.told()}")
    profile.set_shape(entry.name, *[(batch, *entry.shape[1:]) for batch in shapes])
    if config.add_optimization_profile(profile) < 0:
        raise UserError(f"--shapes: TensorRT refuses {list(shapes)} for {entry.name}: {log.told()}")


def _load_timing(trt: Any, config: Any, path: Path, log: Any) -> None:
    """A cache belongs to the TensorRT and the device it was measured by (TensorRT documentation, performance:

    builder-performance). Beside one of ours a JSON says which; one without is for TensorRT to judge.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"--timing-cache {path}: not a file; name a file")
    make_parent(path)
    told = sidecar_of(path)
    if path.exists() and told.exists():
        made, here = artifacts.read_json(told, CACHE_SCHEMA), _timed_by(trt)
        if made != here:
            raise UserError(
                f"--timing-cache {path}: measured by {_by(made)}, here is {_by(here)}; name another file"
            )
    cache = config.create_timing_cache(path.read_bytes() if path.exists() else b"")
    if cache is None or not config.set_timing_cache(cache, False):
        reason = log.told() or "measured by another version or device"
        raise UserError(f"--timing-cache {path}: TensorRT refuses it: {reason}; name another file")


def _save_timing(trt: Any, config: Any, path: Path, log: Any) -> None:
    cache = config.get_timing_cache()
    blob = None if cache is None else cache.serialize()
    if blob is None:
        raise UserError(
            f"--timing-cache {path}: TensorRT gives none back: {log.told()}; leave it out"
        )
    with atomic(path) as temporary:
        temporary.write_bytes(bytes(blob))
    artifacts.write_json(sidecar_of(path), _timed_by(trt))


def _timed_by(trt: Any) -> dict[str, Any]:
    gpu = driver.device()
    return {
        "schema": CACHE_SCHEMA,
        "version": trt.__version__,
        "gpu": gpu.name if gpu else None,
        "sm": gpu.sm if gpu else None,
        "driver": gpu.driver if gpu else None,
    }


def _by(made: Mapping[str, Any]) -> str:
    return f"TensorRT {made.get('version')} on {made.get('gpu')}, driver CUDA {made.get('driver')}"


def parse_shapes(text: str) -> tuple[int, int, int]:
    """`1,1,8` -> smallest, usual, largest batch. Raises UserError: not three whole numbers in that order."""
    if not re.fullmatch(r"\s*\d{1,9}\s*(,\s*\d{1,9}\s*){2}", text, re.ASCII):
        raise UserError(f"--shapes: got {text!r}; allowed: three batches like 1,1,8")
    least, usual, most = (int(part) for part in text.split(","))
    if not 1 <= least <= usual <= most:
        raise UserError(f"--shapes: got {text!r}; allowed: 1 <= smallest <= usual <= largest")
    return least, usual, most
