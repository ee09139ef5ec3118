"""Tile sizes by kernel and GPU generation: a static table, so that nothing is tuned, or changes, at run time."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)  # compute capability times ten
LARGE_REGISTER_FILE = (90, 100)  # where a whole head of `small` stays in registers
SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # a program may take


@dataclass(frozen=True)
class Config:
    """Rows of a tile, keys of a tile, warps of a program, stages of its loads."""

    block: int
    keys: int
    warps: int
    stages: int


TABLE: dict[str, tuple[Config, Config]] = {  # on sm_90 and sm_100; elsewhere
    "swap_mix": (Config(64, 0, 4, 1), Config(64, 0, 4, 1)),
    "gram": (Config(64, 0, 8, 2), Config(32, 0, 8, 2)),
    "small": (Config(64, 64, 8, 1), Config(64, 64, 8, 1)),
    "flash_forward": (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    "flash_queries": (Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    "flash_keys": (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
}


def config(kernel: str, architecture: int) -> Config:
    """The entry of a kernel for a compute capability such as 90."""
    large, small = TABLE[kernel]
    return large if architecture in LARGE_REGISTER_FILE else small
