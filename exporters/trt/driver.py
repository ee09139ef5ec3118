"""The first CUDA device, by libcuda itself: without a GPU torch and TensorRT may crash when asked."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*


@dataclass(frozen=True)
class CudaDevice:
    """A GPU: name; sm as in file names (`90`); driver as the CUDA version it supports (`13.0`)."""

    name: str
    sm: str
    driver: str


@cache
def device() -> CudaDevice | None:
    """Device 0, or None without a driver or a GPU."""
    try:
        cuda = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
    except OSError:
        return None
    handle, version = ctypes.c_int(), ctypes.c_int()
    major, minor = ctypes.c_int(), ctypes.c_int()
    name = ctypes.create_string_buffer(256)
    calls: tuple[Callable[[], int], ...] = (
        lambda: cuda.cuInit(0),
        lambda: cuda.cuDeviceGet(ctypes.byref(handle), 0),
        lambda: cuda.cuDriverGetVersion(ctypes.byref(version)),
        lambda: cuda.cuDeviceGetName(name, len(name), handle),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(major), _MAJOR, handle),
        lambda: cuda.cuDeviceGetAttribute(ctypes.byref(minor), _MINOR, handle),
    )
    if any(call() != 0 for call in calls):
        return None
    driver = f"{version.value // 1000}.{version.value % 1000 // 10}"
    return CudaDevice(name.value.decode(), f"{major.value}{minor.value}", driver)
