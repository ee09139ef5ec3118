"""Seeds and permutations as pure functions of their names, so that a resumed run draws the same numbers."""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

from pipeline.core import artifacts


def permutation(n: int, seed: int, stream: str, epoch: int) -> NDArray[np.int64]:
    """Draw the order of `n` items in one epoch of a named stream; a function of its arguments alone."""
    key = hashlib.blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).permutation(n)


def step_seed(seed: int, step: int, stream: str) -> int:
    """Compute the seed of one named stream of random numbers in one step."""
    return int(artifacts.digest([seed, step, stream])[:15], 16)
