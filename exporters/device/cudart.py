"""As much of the CUDA runtime as one inference needs, through ctypes: memory, copies, a stream, the device."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import UserError

NAMES = (
    "libcudart.so.12",
    "libcudart.so.13",
    "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
)
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76  # cudaDeviceAttr
SIGNATURES = {
    "cudaGetDeviceCount": (ctypes.POINTER(ctypes.c_int),),
    "cudaDeviceGetAttribute": (ctypes.POINTER(ctypes.c_int), ctypes.c_int, ctypes.c_int),
    "cudaMalloc": (ctypes.POINTER(ctypes.c_void_p), ctypes.c_size_t),
    "cudaFree": (ctypes.c_void_p,),
    "cudaMemcpyAsync": (
        ctypes.c_void_p,
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_void_p,
    ),
    "cudaStreamCreate": (ctypes.POINTER(ctypes.c_void_p),),
    "cudaStreamSynchronize": (ctypes.c_void_p,),
}


class Cuda:
    """The runtime library, loaded, with at least one device behind it; device 0 is used."""

    def __init__(self) -> None:
        """Raises UserError: no library, no driver, no device."""
        self._library = _load()
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._library.cudaGetErrorString.argtypes = (ctypes.c_int,)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        if not count.value:
            raise UserError(f"--runtime trt: CUDA counts {count.value} devices; use ort or ov")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            words = self._library.cudaGetErrorString(status) or b"unknown"
            raise UserError(
                f"--runtime trt: {name} failed with {status}, {words.decode(errors='replace')}; "
                "check the driver and free memory, or use --runtime ort"
            )

    def device(self) -> dict[str, int]:
        """What an engine is bound to: `sm` (87 for 8.7) and the number of `multiprocessors`."""
        major, minor, count = map(self._attribute, (MAJOR, MINOR, MULTIPROCESSORS))
        return {"sm": 10 * major + minor, "multiprocessors": count}

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def stream(self) -> int:
        """A new stream's handle."""
        handle = ctypes.c_void_p()
        self._call("cudaStreamCreate", ctypes.byref(handle))
        return handle.value or 0

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the device."""
        address = ctypes.c_void_p()
        self._call("cudaMalloc", ctypes.byref(address), size)
        return address.value or 0

    def free(self, address: int) -> None:
        """Give memory back."""
        self._call("cudaFree", address)

    def upload(self, address: int, array: NDArray[np.float32], stream: int) -> None:
        """Queue the copy of a contiguous array to the device; it must live until `wait`."""
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, TO_DEVICE, stream)

    def download(self, array: NDArray[np.float32], address: int, stream: int) -> None:
        """Queue the copy from the device into a contiguous array; it is filled after `wait`."""
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, TO_HOST, stream)

    def wait(self, stream: int) -> None:
        """Until everything queued on the stream is done."""
        self._call("cudaStreamSynchronize", stream)


def _load() -> Any:
    """libcudart from where the loader finds it, or from the wheels that carry it."""
    wheels = [
        str(p) for folder in sys.path for p in Path(folder).glob("nvidia/*/lib/libcudart.so.*")
    ]
    for name in (*NAMES, *wheels):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise UserError(
        f"--runtime trt: no CUDA runtime library ({', '.join(NAMES)}); set LD_LIBRARY_PATH to its folder"
    )
