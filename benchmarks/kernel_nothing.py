"""An empty Triton kernel with as many arguments as ours have: what one launch of it takes is the host's."""

from __future__ import annotations

import triton
from torch import Tensor


@triton.jit
def nothing_kernel(x, a, b, c, d, e, f, g, h, i, j, k, l, m, n, o, p, q, r, s, t, u, v, w):  # noqa: E741
    """Do nothing."""


def launch(x: Tensor) -> None:
    """Start the kernel once: a tensor and 23 numbers."""
    nothing_kernel[(1,)](x, *range(23))
