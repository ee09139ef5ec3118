"""Shapes of the projector losses that the kernel benchmark measures: those that users have."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """B samples, a grid of N tokens, H heads, d wide; c channels of the student's tap."""

    batch: int
    grid: tuple[int, int]
    n_heads: int
    width: int
    channels: int = 0

    def __str__(self) -> str:
        heads = f"H {self.n_heads} d {self.width}"
        return f"B {self.batch} N {self.n} {heads} c {self.channels}"

    @property
    def n(self) -> int:
        """Tokens."""
        return self.grid[0] * self.grid[1]


ON_GPU = (
    Shape(256, (14, 14), 12, 64, 1024),
    Shape(512, (7, 7), 12, 64, 2048),
    Shape(512, (8, 8), 6, 64, 512),
    Shape(1024, (8, 8), 3, 64, 512),
    Shape(256, (12, 12), 6, 32, 512),
    Shape(128, (16, 16), 16, 64, 1024),
    Shape(128, (16, 16), 16, 80, 1024),
    Shape(64, (24, 24), 12, 64, 1024),
)
ON_CPU = (
    Shape(16, (14, 14), 12, 64, 256),
    Shape(32, (7, 7), 12, 64, 512),
    Shape(64, (8, 8), 4, 16, 64),
)
