"""How far a run is: one plain line every few seconds."""

from __future__ import annotations

import time


class Progress:
    """One plain line every few seconds (or at the end): step, share, rate and the figures given."""

    def __init__(self, what: str, total: int, every: float = 5.0) -> None:
        self.what, self.total, self.every = what, total, every
        self._start = self._last = time.monotonic()
        self._first: int | None = None

    def __call__(self, done: int, **figures: float) -> None:
        """Note that `done` of `total` is done."""
        now = time.monotonic()
        if self._first is None:
            self._first = done - 1
        if now - self._last < self.every and done < self.total:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        shown = "  ".join(f"{k} {v:.4g}" for k, v in figures.items())
        print(f"{self.what} {done}/{self.total}  {rate:.1f}/s  {shown}", flush=True)
