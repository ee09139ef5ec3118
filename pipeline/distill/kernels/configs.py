"""Tile sizes by kernel and GPU generation: a static table, so that nothing is tuned, or changes, at run time."""

from __future__ import annotations

from dataclasses import dataclass

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)  # compute capability times ten
LARGE_REGISTER_FILE = (90, 100)  # where a whole head of `small` stays in registers
MAX_TOKENS = 64  # that `small` holds in one program
WIDEST_HEAD = 128  # the bits of one Philox counter
SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # a program may take


@dataclass(frozen=True)
class Config:
    """Rows of a tile; keys, or depth of a product, taken at once; warps; stages of loads; columns."""

    block: int
    inner: int
    warps: int
    stages: int
    columns: int = 0  # 0: those of a head, or of one Philox counter


TABLE: dict[str, tuple[Config, Config]] = {  # on sm_90 and sm_100; elsewhere
    "swap_mix": (Config(64, 0, 4, 1), Config(64, 0, 4, 1)),
    "dropout": (Config(32, 0, 4, 1), Config(32, 0, 4, 1)),
    "gram": (Config(64, 0, 8, 2), Config(32, 0, 8, 2)),
    "small": (Config(64, 64, 8, 1), Config(64, 64, 8, 1)),
    "flash_forward": (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    "flash_queries": (Config(64, 64, 4, 2), Config(64, 64, 4, 2)),
    "flash_keys": (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    "gl_project": (Config(128, 64, 8, 3, 128), Config(128, 32, 8, 3, 128)),
    "gl_input": (Config(128, 64, 8, 3, 128), Config(128, 32, 8, 3, 128)),
    "gl_weight": (Config(128, 64, 8, 3, 128), Config(128, 32, 8, 3, 128)),
}


def config(kernel: str, architecture: int) -> Config:
    """The entry of a kernel for a compute capability such as 90."""
    large, small = TABLE[kernel]
    return large if architecture in LARGE_REGISTER_FILE else small
