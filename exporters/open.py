"""The table of runtimes, and functions that open an artefact in one."""

from __future__ import annotations

from pathlib import Path

from exporters.artifact.eager import COMPILED, EAGER
from exporters.artifact.runtime import Runtime
from exporters.artifact.session import Session, Target
from exporters.ort.runtime import ORT
from exporters.ov.runtime import OV
from exporters.trt.runtime import RTX, TRT
from pipeline.core.errors import UserError, nearest

RUNTIMES: dict[str, Runtime] = {r.name: r for r in (EAGER, COMPILED, ORT, OV, RTX, TRT)}


def open_session(target: Target, artefact: Path, threads: int) -> Session:
    """Load `artefact` in the target's runtime and precision. Raises as `Runtime.open`."""
    return RUNTIMES[target.runtime].open(artefact, threads, target.precision)


def open_artefact(path: Path, threads: int) -> Session:
    """Load any artefact by its suffix, in float32 where the runtime leaves a choice.

    Raises as `Runtime.open`; UserError on another suffix.
    """
    runtimes = {runtime.suffix: runtime for runtime in reversed(RUNTIMES.values())}
    if path.suffix not in runtimes:
        raise UserError(f"{path}: got suffix {path.suffix!r}; {nearest(path.suffix, runtimes)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; expected an artefact; check the path")
    return runtimes[path.suffix].open(path, threads, "fp32")
