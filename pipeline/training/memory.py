"""Memory of a training on a CPU: what a step frees stays with the process for the next one."""

from __future__ import annotations

import ctypes
import os
import platform

# glibc's mallopt(3)
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
NEVER = -1  # as a threshold: trim at no size


def keep_freed() -> bool:
    """Make glibc's malloc keep what is freed; return whether it does so from now on.

    By default it maps every tensor above 32 MB anew, returns it, and trims its heap: the kernel clears the same
    pages in every step. No result changes; the process may take some more memory. Nothing is set on another C
    library, or where the environment sets malloc up.
    """
    if platform.libc_ver()[0] != "glibc" or _set_up_by_user():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    return bool(mallopt(M_TRIM_THRESHOLD, NEVER) and mallopt(M_MMAP_MAX, 0))


def _set_up_by_user() -> bool:
    """Whether the environment has settings of malloc."""
    tunables = os.environ.get("GLIBC_TUNABLES", "")
    return "glibc.malloc." in tunables or any(name.startswith("MALLOC_") for name in os.environ)
