"""A reader for the pickles of the CIFAR archives: it can build dict, list, str, bytes, int, ndarray, no more.

A pickle is a program: an ordinary reader imports and calls whatever the file names. This one hands out four
stand-ins for the names NumPy's arrays are pickled under, and refuses every other name before anything is called.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.errors import UserError


def loads(raw: bytes, origin: str) -> Any:
    """The value in a pickle. Raises UserError: it names anything else, or is damaged."""
    try:
        _check_memo(raw)
        return _plain(_Reader(io.BytesIO(raw), encoding="bytes").load())
    except UserError as error:
        raise UserError(f"{origin}: {error}; fetch the archive again") from None
    except Exception as error:  # a damaged pickle raises whatever its bytes happen to mean
        raise UserError(
            f"{origin}: not a CIFAR batch ({type(error).__name__}: {error}); fetch the archive again"
        ) from None


def _check_memo(raw: bytes) -> None:
    """Raise ValueError where a memo index is larger than the pickle is long.

    Python's reader allocates a table up to that index: 40 bytes could take 34 GB.
    """
    for code, number, _ in pickletools.genops(raw):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and number not in range(len(raw)):
            raise ValueError(f"memo index: got {number}; expected below {len(raw)}")


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if module in ("numpy.core.multiarray", "numpy._core.multiarray") and name == "_reconstruct":
            return _Reconstruct()
        if (module, name) == ("numpy", "ndarray"):
            return _Name("ndarray")
        if (module, name) == ("numpy", "dtype"):
            return _MakeDtype()
        if (module, name) == ("_codecs", "encode"):  # how protocol 2 writes bytes
            return _Encode()
        raise UserError(
            f"got a pickle that names {module}.{name}; expected dict, list, str, bytes, numbers, NumPy arrays only"
        )


class _Name:
    """A name the pickle may mention and not call."""

    def __init__(self, name: str) -> None:
        self.name = name


class _Dtype:
    """A dtype being built; only unsigned bytes are pixels."""

    def __init__(self, code: str) -> None:
        if code not in ("u1", "uint8"):
            raise UserError(f"got an array of dtype {code!r}; expected unsigned bytes (u1)")

    def __setstate__(self, _: Any) -> None: ...


class _Array:
    """An array being built: `__setstate__` gets (version, shape, dtype, Fortran order, bytes)."""

    def __init__(self) -> None:
        self.value: NDArray[np.uint8] = np.empty(0, np.uint8)

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        if not isinstance(dtype, _Dtype) or not isinstance(raw, bytes):
            raise UserError(
                f"got an array of {type(dtype).__name__} over {type(raw).__name__}; expected unsigned bytes (u1)"
            )
        order = "F" if fortran else "C"
        self.value = np.frombuffer(raw, np.uint8).reshape(shape, order=order)  # type: ignore[call-overload]


class _Reconstruct:
    def __call__(self, *_: Any) -> _Array:
        return _Array()


class _MakeDtype:
    def __call__(self, code: str | bytes, *_: Any) -> _Dtype:
        return _Dtype(code.decode() if isinstance(code, bytes) else code)


class _Encode:
    def __call__(self, text: str | bytes, _: Any) -> bytes:
        return text.encode("latin-1") if isinstance(text, str) else text


def _plain(value: Any) -> Any:
    """Stand-ins -> arrays; str keys of a dict, however the pickle spelt them."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        return {k.decode() if isinstance(k, bytes) else k: _plain(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if value is None or isinstance(value, int | str | bytes):
        return value
    raise UserError(
        f"got a {type(value).__name__.strip('_')}; expected plain values and arrays of a CIFAR batch"
    )
