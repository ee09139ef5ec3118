"""An engine file: which TensorRT made it, the sidecar beside it, and whether it can run here.

Engines are not portable; the sidecar says what one was built by, on and from, so that a wrong host is told
what to rebuild instead of failing in the runtime.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters import cuda
from exporters.session import Unavailable
from pipeline import files
from pipeline.errors import UserError, nearest

SCHEMA = "cakd.plan/1"
OLDEST = (
    10,
    12,
)  # of full TensorRT: the first with everything used here in its strongly typed form
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "trt", "rtx": "trt-rtx"}


def backend(name: str) -> tuple[str, Any]:
    """(`tensorrt` | `rtx`, its module). `auto`: full TensorRT where it and a GPU are present, else RTX.

    Raises UserError on another name; Unavailable: package missing, too old, full TensorRT without a GPU.
    """
    if name not in ("auto", *MODULES):
        raise UserError(f"--backend: got {name!r}; {nearest(name, ('auto', *MODULES))}")
    if name == "auto":
        try:
            return backend("tensorrt")
        except Unavailable:
            return backend("rtx")
    try:
        trt = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        other = "" if name == "rtx" else "; --backend rtx builds without a GPU"
        why = f"{MODULES[name]} is missing ({error}); `pip install '.[{EXTRAS[name]}]'`{other}"
        raise Unavailable(why) from None
    version = tuple(int(part) for part in trt.__version__.split(".")[:2])
    if name == "tensorrt" and version < OLDEST:
        raise Unavailable(
            f"TensorRT {trt.__version__} is older than 10.12; `pip install 'tensorrt>=10.12'`"
        )
    if name == "tensorrt" and cuda.device() is None:
        raise Unavailable("full TensorRT builds on its GPU: no CUDA device; use --backend rtx")
    return name, trt


def label(name: str, trt: Any) -> str:
    """`rtx1.7`, or `trt11.4-sm90`: a full TensorRT engine runs on the GPU generation it was built on."""
    version = ".".join(trt.__version__.split(".")[:2])
    gpu = cuda.device()
    return f"rtx{version}" if name == "rtx" or gpu is None else f"trt{version}-sm{gpu.sm}"


def logger(trt: Any) -> Any:
    """A TensorRT logger that keeps errors for the message to raise: failures return None, not exceptions."""

    class Log(trt.ILogger):  # type: ignore[misc]
        """Keeps errors for the message that is raised, drops the rest."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if int(severity) <= int(trt.ILogger.Severity.ERROR):
                self.errors.append(" ".join(message.split()))

        def told(self) -> str:
            return "; ".join(self.errors[-3:])

    return Log()


def sidecar_of(plan: Path) -> Path:
    """student.plan -> student.plan.json."""
    return plan.with_name(f"{plan.name}.json")


def read_sidecar(plan: Path) -> dict[str, Any]:
    """The sidecar, checked against the plan's bytes.

    Raises UserError: plan or sidecar missing, or not made together.
    """
    again = "build it with `python -m exporters.trt`"
    if not plan.is_file():
        raise UserError(f"{plan}: no such plan; {again}")
    if not sidecar_of(plan).is_file():
        raise UserError(
            f"{plan}: {sidecar_of(plan).name} is missing: its maker is unknown; {again}"
        )
    sidecar = files.read_json(sidecar_of(plan), SCHEMA)
    if files.sha256(plan) != sidecar["plan_sha256"]:
        raise UserError(f"{plan}: not the plan of {sidecar_of(plan).name}; {again}")
    return sidecar


def obstacle(sidecar: Mapping[str, Any]) -> str | None:
    """Why this plan cannot run here, and what to do; None where it can."""
    gpu = cuda.device()
    if gpu is None:
        return "no CUDA device"
    try:
        name, trt = backend(sidecar["backend"])
    except Unavailable as error:
        return str(error)
    if trt.__version__ != sidecar["version"]:
        return f"built by {name} {sidecar['version']}, here is {trt.__version__}: build it again"
    if name == "tensorrt" and sidecar["gpu"]["sm"] != gpu.sm:
        return f"built for SM {sidecar['gpu']['sm']}, this GPU is SM {gpu.sm}: build it on this GPU"
    return None
