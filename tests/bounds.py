"""How far a projector kernel may be from float64, relative L2, by dtype: in the interpreter and on a GPU."""

from __future__ import annotations

import re

# Of losses, and of gradients and other tensors. float32 is multiplied exactly: rounding of N to d additions, some
# 1e-7; a planted fault shows 5e-3 or more.
BOUNDS = {"float32": (1e-6, 5e-6), "float16": (5e-4, 2e-3), "bfloat16": (3e-3, 1e-2)}
GRAM_BFLOAT16 = 6e-3  # however near the student is


def bound(name: str, kind: str) -> float:
    """The bound of one error by its name."""
    if name.endswith("gram gradient") and kind == "bfloat16":
        return GRAM_BFLOAT16
    of_loss, of_tensor = BOUNDS[kind]
    return of_tensor if re.search("gradient|out|residual", name) else of_loss
