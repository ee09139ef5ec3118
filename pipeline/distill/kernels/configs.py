"""Tile sizes by kernel and GPU generation: a static table, so that nothing is tuned, or changes, at run time.

No GPU has measured these sizes: they come from the compiler (no spilled register, most warps on a
multiprocessor) and from arithmetic (a larger block reads the keys less often). `measured.py` has what a GPU
said.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 120)  # compute capability times ten
LARGE_REGISTER_FILE = (90, 100)  # where a whole head of `small` stays in registers
MAX_TOKENS = 64  # that `small` holds in one program
WIDEST_HEAD = 128  # the bits of one Philox counter
WIDEST_GRAM = 64  # three matrices d x d stay in registers
SHARED_KB = {80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 120: 99}  # a program may take


@dataclass(frozen=True)
class Config:
    """Rows of a tile; keys, or depth of a product, taken at once; warps; stages of loads; columns."""

    block: int
    inner: int
    warps: int
    stages: int
    columns: int = 0  # 0: those of a head, or of one Philox counter

    def of(self, element_size: int) -> Config:
        """The sizes for elements of so many bytes; the table's are for 2.

        With 4 a deep tile of a product does not fit the shared memory, nor a head the registers of four warps.
        """
        if element_size != 4:
            return self
        if self.columns:
            return replace(self, inner=self.inner // 2)
        return replace(self, block=min(self.block, 64), warps=8)


TABLE: dict[str, tuple[Config, Config]] = {  # on sm_90 and sm_100; elsewhere
    "swap_mix": (Config(64, 0, 4, 1), Config(64, 0, 4, 1)),
    "dropout": (Config(32, 0, 4, 1), Config(32, 0, 4, 1)),
    "gram": (Config(64, 0, 8, 2), Config(32, 0, 8, 2)),
    "small_losses": (Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
    "small_gradient": (Config(64, 64, 4, 1), Config(64, 64, 4, 1)),
    "flash_losses": (Config(128, 64, 8, 2), Config(64, 32, 4, 2)),
    "flash_queries": (Config(128, 64, 8, 2), Config(64, 32, 4, 2)),
    "flash_keys": (Config(64, 64, 4, 2), Config(64, 32, 4, 2)),
    "gl_project": (Config(128, 64, 8, 3, 128), Config(128, 32, 8, 3, 128)),
    "gl_gradients": (Config(128, 64, 8, 4, 128), Config(128, 32, 8, 3, 128)),
}
WIDE_HEADS: dict[str, tuple[Config, Config]] = {  # wider than 64
    "small_losses": (Config(64, 64, 4, 1), Config(64, 64, 8, 1)),
    "small_gradient": (Config(64, 64, 8, 1), Config(64, 64, 8, 1)),
}


def config(kernel: str, architecture: int, width: int = 0) -> Config:
    """The entry of a kernel for a compute capability such as 90 and heads of this width."""
    large, small = WIDE_HEADS[kernel] if width > 64 and kernel in WIDE_HEADS else TABLE[kernel]
    return large if architecture in LARGE_REGISTER_FILE else small
