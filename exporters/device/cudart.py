"""The CUDA runtime as far as inference needs it, through ctypes: memory, copies, a stream, graphs, events."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from .errors import Named, UserError

NAMES = (
    "libcudart.so.12",
    "libcudart.so.13",
    "libcudart.so",
    "/usr/local/cuda/lib64/libcudart.so",
)
TO_DEVICE, TO_HOST = 1, 2  # cudaMemcpyKind
MULTIPROCESSORS, MAJOR, MINOR = 16, 75, 76  # cudaDeviceAttr
# cudaStreamCaptureMode: CUDA calls of other threads do not end a capture.
THREAD_LOCAL = 1
INT, POINTER = ctypes.c_int, ctypes.c_void_p  # streams, events and graphs are pointers too
TO_INT, TO_POINTER = ctypes.POINTER(INT), ctypes.POINTER(POINTER)
SIGNATURES = {
    "cudaGetDeviceCount": (TO_INT,),
    "cudaDeviceGetAttribute": (TO_INT, INT, INT),
    "cudaMalloc": (TO_POINTER, ctypes.c_size_t),
    "cudaFree": (POINTER,),
    "cudaMemcpyAsync": (POINTER, POINTER, ctypes.c_size_t, INT, POINTER),
    "cudaStreamCreate": (TO_POINTER,),
    "cudaStreamSynchronize": (POINTER,),
    "cudaStreamBeginCapture": (POINTER, INT),
    "cudaStreamEndCapture": (POINTER, TO_POINTER),
    # The arguments of cudaGraphInstantiate changed with CUDA 12, those of this one did not.
    "cudaGraphInstantiateWithFlags": (TO_POINTER, POINTER, ctypes.c_ulonglong),
    "cudaGraphDestroy": (POINTER,),
    "cudaGraphLaunch": (POINTER, POINTER),
    "cudaEventCreate": (TO_POINTER,),
    "cudaEventRecord": (POINTER, POINTER),
    "cudaEventElapsedTime": (ctypes.POINTER(ctypes.c_float), POINTER, POINTER),
}


class Cuda(Named):
    """The CUDA runtime library, loaded, with at least one device; device 0 is used."""

    name = "--runtime trt"

    def __init__(self) -> None:
        """Raises UserError: no library, no driver, no device."""
        self._library = _load()
        if self._library is None:
            names = ", ".join(NAMES)
            raise self.error(
                f"no CUDA runtime library ({names}); set LD_LIBRARY_PATH to its folder"
            )
        # Without argument types ctypes passes addresses as 32-bit integers.
        for name, arguments in SIGNATURES.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = arguments, ctypes.c_int
        self._library.cudaGetErrorString.argtypes = (ctypes.c_int,)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p
        count = ctypes.c_int()
        self._call("cudaGetDeviceCount", ctypes.byref(count))
        if not count.value:
            raise self.error(f"got {count.value} CUDA devices; expected one; check the driver")

    def error(self, message: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {message}, or use --runtime ort")

    def _call(self, name: str, *arguments: Any) -> None:
        status = getattr(self._library, name)(*arguments)
        if status:
            text = (self._library.cudaGetErrorString(status) or b"unknown").decode(errors="replace")
            raise self.error(f"{name}: got {status}, {text}; check the driver and free memory")

    def _handle(self, name: str, *arguments: Any) -> int:
        """The handle that a call writes through its first argument."""
        handle = ctypes.c_void_p()
        self._call(name, ctypes.byref(handle), *arguments)
        return handle.value or 0

    def device(self) -> dict[str, int]:
        """The properties an engine is bound to: `sm` (87 for 8.7) and the number of `multiprocessors`."""
        major, minor, count = map(self._attribute, (MAJOR, MINOR, MULTIPROCESSORS))
        return {"sm": 10 * major + minor, "multiprocessors": count}

    def _attribute(self, number: int) -> int:
        value = ctypes.c_int()
        self._call("cudaDeviceGetAttribute", ctypes.byref(value), number, 0)
        return value.value

    def stream(self) -> int:
        """A new stream's handle."""
        return self._handle("cudaStreamCreate")

    def allocate(self, size: int) -> int:
        """The address of `size` bytes on the device."""
        return self._handle("cudaMalloc", size)

    def free(self, address: int) -> None:
        """Free device memory."""
        self._call("cudaFree", address)

    def upload(self, address: int, array: NDArray[Any], stream: int) -> None:
        """Queue the copy of a contiguous array to the device; the array must live until `wait`."""
        self._call("cudaMemcpyAsync", address, array.ctypes.data, array.nbytes, TO_DEVICE, stream)

    def download(self, array: NDArray[Any], address: int, stream: int) -> None:
        """Queue the copy from the device into a contiguous array; it is filled after `wait`."""
        self._call("cudaMemcpyAsync", array.ctypes.data, address, array.nbytes, TO_HOST, stream)

    def wait(self, stream: int) -> None:
        """Block until everything queued on the stream is done."""
        self._call("cudaStreamSynchronize", stream)

    def capture(self, stream: int, work: Callable[[], None]) -> int:
        """Record what `work` queues on the stream, without running it; returns the graph's handle for `launch`."""
        self._call("cudaStreamBeginCapture", stream, THREAD_LOCAL)
        graph = ctypes.c_void_p()
        try:
            work()
        except BaseException:
            # A stream left in capture mode would fail every later call; the part captured so far is useless.
            self._library.cudaStreamEndCapture(stream, ctypes.byref(graph))
            raise
        self._call("cudaStreamEndCapture", stream, ctypes.byref(graph))
        executable = self._handle("cudaGraphInstantiateWithFlags", graph, 0)
        self._call("cudaGraphDestroy", graph)
        return executable

    def launch(self, graph: int, stream: int) -> None:
        """Queue the work of a captured graph."""
        self._call("cudaGraphLaunch", graph, stream)

    def event(self) -> int:
        """A new event's handle."""
        return self._handle("cudaEventCreate")

    def record(self, event: int, stream: int) -> None:
        """Queue the event, which is reached once the work queued before it is done."""
        self._call("cudaEventRecord", event, stream)

    def elapsed_ms(self, began: int, ended: int) -> float:
        """Device time in ms between two events that have been reached."""
        milliseconds = ctypes.c_float()
        self._call("cudaEventElapsedTime", ctypes.byref(milliseconds), began, ended)
        return milliseconds.value


def _load() -> Any:
    """libcudart from the loader's path, or from the wheels that carry it; None where it is not found."""
    wheels = [
        str(p) for folder in sys.path for p in Path(folder).glob("nvidia/*/lib/libcudart.so.*")
    ]
    for name in (*NAMES, *wheels):
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None
