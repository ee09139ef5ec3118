"""Opens an artefact in its runtime.

A runtime is imported when it is asked for, so that a missing one hurts no other.
"""

from __future__ import annotations

from pathlib import Path

from exporters.session import Session, Target
from pipeline.errors import UserError, nearest


def open_session(target: Target, artefact: Path, threads: int) -> Session:
    """Load `artefact` in the target's runtime with that many intra-op threads.

    Raises Unavailable with the reason where the runtime or its device is missing,
    UserError where the artefact is damaged or foreign.
    """
    if target.runtime == "torch":
        from exporters.eager import EagerSession

        return EagerSession(artefact, threads, compiled=target.name == "torch-compile")
    if target.runtime == "ort":
        from exporters.ort_session import OrtSession

        return OrtSession(artefact, threads)
    if target.runtime == "ov":
        from exporters.ov import OvSession

        return OvSession(artefact, threads, target.precision)
    from exporters.trt_session import TrtSession

    return TrtSession(artefact)


def open_artefact(path: Path, threads: int) -> Session:
    """Load any artefact by its suffix, in float32 where the runtime leaves a choice.

    Raises as `open_session`; UserError on another suffix.
    """
    runtimes = {".safetensors": "torch", ".onnx": "ort", ".xml": "ov", ".plan": "trt"}
    if path.suffix not in runtimes:
        raise UserError(f"{path}: suffix is {path.suffix!r}; {nearest(path.suffix, runtimes)}")
    if not path.is_file():
        raise UserError(f"{path}: no such file; give an artefact that exists")
    return open_session(Target("any", runtimes[path.suffix], "fp32", path.name), path, threads)
