"""A plan (engine file): the TensorRT that builds it, the sidecar beside it, and whether it can run here.

Engines are not portable; the sidecar says what one was built by, on and from, so that the wrong host gets the
command that rebuilds it instead of an error inside the runtime.
"""

from __future__ import annotations

import importlib
import platform
import re
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exporters.artifact.session import Unavailable
from exporters.device.compiled_cache import sidecar_path
from exporters.trt import driver
from pipeline.core import artifacts
from pipeline.core.errors import UserError, nearest

SCHEMA = "cakd.plan/2"
# The first full TensorRT with everything used here in its strongly typed form.
MIN_VERSION = (10, 12)
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx"}
EXTRAS = {"tensorrt": "trt", "rtx": "trt-rtx"}
AMPERE = 80  # the SM version
KEYS: dict[str, type | tuple[type, ...]] = {  # the keys of a sidecar that are read, and their types
    **dict.fromkeys(("backend", "version", "platform", "precision", "plan_sha256"), str),
    **dict.fromkeys(("tf32", "version_compatible", "hardware_compatible"), bool),
    **dict.fromkeys(("shapes", "input_shape"), list),
    **dict.fromkeys(("onnx", "notes"), dict),
    **dict.fromkeys(("optimization_level", "timing_cache"), (int, str, type(None))),
    "size_mb": float,
    "gpu": (dict, type(None)),
}


def backend(name: str) -> tuple[str, Any]:
    """(`tensorrt` | `rtx`, its module). `auto`: full TensorRT where it and a GPU are present, else RTX.

    Raises UserError on another name; Unavailable: package missing, too old, full TensorRT without a GPU.
    """
    if name not in ("auto", *MODULES):
        raise UserError(f"--backend: got {name!r}; {nearest(name, ('auto', *MODULES))}")
    if name == "auto":
        try:
            return backend("tensorrt")
        except Unavailable as full:
            return _rtx_or_reasons(str(full))
    try:
        trt = importlib.import_module(MODULES[name])
    except (ImportError, OSError) as error:
        other = "" if name == "rtx" else "; --backend rtx builds without a GPU"
        extra = f"`pip install '.[{EXTRAS[name]}]'`{other}"
        raise Unavailable(f"{MODULES[name]}: not installed ({error}); {extra}") from None
    if name == "tensorrt" and release(trt.__version__) < MIN_VERSION:
        raise Unavailable(
            f"tensorrt: got {trt.__version__}; expected 10.12 or later; `pip install 'tensorrt>=10.12'`"
        )
    if name == "tensorrt" and driver.device() is None:
        raise Unavailable("full TensorRT builds on its GPU: no CUDA device; use --backend rtx")
    return name, trt


def _rtx_or_reasons(full: str) -> tuple[str, Any]:
    """TensorRT-RTX; where it is missing too, both reasons in one line, each with its remedy."""
    try:
        return backend("rtx")
    except Unavailable as error:
        raise Unavailable(f"no TensorRT: {full.split('; --backend')[0]}; or {error}") from None


def release(version: str) -> tuple[int, ...]:
    """`10.14.1.48.post1` -> (10, 14, 1, 48), for comparisons of versions."""
    return tuple(int(part) for part in re.findall(r"\d+", version)[:4])


def label(name: str, trt: Any, hardware_compatible: bool = False) -> str:
    """`rtx1.7`, `trt11.4-sm90` (that GPU generation), or `trt11.4-sm80plus` (Ampere and newer)."""
    version = ".".join(trt.__version__.split(".")[:2])
    gpu = driver.device()
    if name == "rtx" or gpu is None:
        return f"rtx{version}"
    return f"trt{version}-sm{f'{AMPERE}plus' if hardware_compatible else gpu.sm}"


def read_sidecar(plan: Path) -> dict[str, Any]:
    """The sidecar, checked against the plan's bytes.

    Raises UserError: plan or sidecar missing, incomplete, or not made together.
    """
    remedy = "build it with `python -m exporters.trt`"
    if not plan.is_file():
        raise UserError(f"{plan}: no such plan; {remedy}")
    if not sidecar_path(plan).is_file():
        raise UserError(
            f"{plan}: no {sidecar_path(plan).name} beside it; expected the sidecar of its build; {remedy}"
        )
    sidecar = artifacts.read_json(sidecar_path(plan), SCHEMA)
    for key, kind in KEYS.items():
        if not isinstance(sidecar.get(key), kind):
            raise UserError(f"{sidecar_path(plan)}: {key}: got {sidecar.get(key)!r}; {remedy}")
    if artifacts.sha256(plan) != sidecar["plan_sha256"]:
        raise UserError(f"{plan}: SHA-256 is not that of {sidecar_path(plan).name}; {remedy}")
    return sidecar


def system() -> str:
    """`linux-x86_64`: the platform that an engine is bound to."""
    return f"{sys.platform}-{platform.machine()}"


def command(sidecar: Mapping[str, Any], plan: Path) -> str:
    """The command line that builds this plan here."""
    words = ["python", "-m", "exporters.trt", sidecar["onnx"]["file"], "-o", str(plan)]
    words += ["--precision", sidecar["precision"], "--backend", sidecar["backend"]]
    if sidecar["input_shape"][0] is None:
        words += ["--shapes", ",".join(map(str, sidecar["shapes"]))]
    words += ["--version-compatible"] if sidecar["version_compatible"] else []
    words += ["--hardware-compatible"] if sidecar["hardware_compatible"] else []
    if sidecar["optimization_level"] is not None:
        words += ["--optimization-level", str(sidecar["optimization_level"])]
    images = " --calib IMAGES" if sidecar["precision"] == "int8" else ""
    return f"`{shlex.join(words)}{images}`"


def obstacle(sidecar: Mapping[str, Any], plan: Path) -> str | None:
    """The reason why this plan cannot run here, with the command that rebuilds it; None where it can."""
    gpu = driver.device()
    if gpu is None:
        return "no CUDA device"
    try:
        name, trt = backend(sidecar["backend"])
    except Unavailable as error:
        return str(error)
    reason = None
    if sidecar["platform"] != system():
        reason = f"built on {sidecar['platform']}, here is {system()}"
    elif not _version_fits(sidecar, trt.__version__):
        reason = f"built by {name} {sidecar['version']}, here is {trt.__version__}"
    elif not _gpu_fits(sidecar, int(gpu.sm)):
        built = sidecar["gpu"]["sm"] if name == "tensorrt" else f"{AMPERE} and newer"
        reason = f"built for SM {built}, this GPU is SM {gpu.sm}"
    return f"{reason}: build it here with {command(sidecar, plan)}" if reason else None


def _version_fits(sidecar: Mapping[str, Any], here: str) -> bool:
    """Whether this version runs the plan: the same one, or a later one for a compatible plan.

    Source: docs.nvidia.com/deeplearning/tensorrt/11.4.1/getting-started/support-matrix.html (Engine Portability),
    11.1.0/inference-library/engine-compatibility.html. RTX plans are never version compatible:
    tensorrt-rtx/latest/inference-library/engine-compatibility.html.
    """
    built = sidecar["version"]
    if built == here:
        return True
    majors = (release(built)[0], release(here)[0])
    later = release(built) <= release(here) and (majors[0] == majors[1] or majors == (10, 11))
    return bool(sidecar["version_compatible"]) and later


def _gpu_fits(sidecar: Mapping[str, Any], sm: int) -> bool:
    """Whether a GPU of this SM runs the plan: the one built on, or Ampere and newer if hardware compatible.

    Source: HardwareCompatibilityLevel in TensorRT's Python reference. RTX builds for Ampere and newer, not for
    Turing: tensorrt-rtx/latest/getting-started/support-matrix.html.
    """
    if sidecar["backend"] == "rtx" or sidecar["hardware_compatible"]:
        return sm >= AMPERE
    return int(sidecar["gpu"]["sm"]) == sm
