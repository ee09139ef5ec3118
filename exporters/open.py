"""Opens an artefact in its runtime.

A runtime is imported when it is asked for, so that a missing one hurts no other.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exporters.artifact.session import TARGETS, Session, Target
from pipeline.core.errors import UserError, nearest

ANY = ("torch-eager", "ort-fp32", "ov-fp32", "rtx-fp32")  # what opens a file that names no target


def _torch(target: Target, artefact: Path, threads: int) -> Session:
    from exporters.artifact.eager import EagerSession

    return EagerSession(artefact, threads, compiled=target.name == "torch-compile")


def _ort(_: Target, artefact: Path, threads: int) -> Session:
    from exporters.ort.session import OrtSession

    return OrtSession(artefact, threads)


def _ov(target: Target, artefact: Path, threads: int) -> Session:
    from exporters.ov.session import OvSession

    return OvSession(artefact, threads, target.precision)


def _trt(_: Target, artefact: Path, __: int) -> Session:
    from exporters.trt.session import TrtSession

    return TrtSession(artefact)


RUNTIMES: dict[str, Callable[[Target, Path, int], Session]] = {
    "torch": _torch,
    "ort": _ort,
    "ov": _ov,
    "trt": _trt,
}


def open_session(target: Target, artefact: Path, threads: int) -> Session:
    """Load `artefact` in the target's runtime with that many intra-op threads.

    Raises Unavailable with the reason where the runtime or its device is missing,
    UserError where the artefact is damaged or foreign.
    """
    return RUNTIMES[target.runtime](target, artefact, threads)


def open_artefact(path: Path, threads: int) -> Session:
    """Load any artefact by its suffix, in float32 where the runtime leaves a choice.

    Raises as `open_session`; UserError on another suffix.
    """
    targets = {Path(TARGETS[name].artefact).suffix: TARGETS[name] for name in ANY}
    if path.suffix not in targets:
        raise UserError(f"{path}: suffix is {path.suffix!r}; {nearest(path.suffix, targets)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an artefact that exists")
    return open_session(targets[path.suffix], path, threads)
