"""Progress of a run: a bar on a terminal, one plain line every few seconds elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from rich.progress import BarColumn, MofNCompleteColumn, TaskID, TextColumn, TimeRemainingColumn
from rich.progress import Progress as Bar


class Progress:
    """Steps done of a total, with rate, time left and figures.

    On a terminal a bar, elsewhere a line every `every` seconds and at the end. `batch` turns the rate into images
    a second, `epoch` (its steps) adds the pass. A context manager; without `with` it prints lines only.
    """

    def __init__(
        self,
        what: str,
        total: int,
        every: float = 5.0,
        batch: int = 0,
        epoch: int = 0,
        quiet: bool = False,
    ) -> None:
        self.what, self.total, self.every = what, total, every
        self.batch, self.epoch, self.quiet = batch, epoch, quiet
        self._start = self._last = time.monotonic()
        self._first: int | None = None
        self._bar: Bar | None = None
        self._task = TaskID(0)

    def __enter__(self) -> Progress:
        if sys.stdout.isatty() and not self.quiet:
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
            figures = TextColumn("{task.fields[text]}")
            self._bar = Bar(*columns, TimeRemainingColumn(), figures)
            self._task = self._bar.add_task(self.what, total=self.total, text="")
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def __call__(self, done: int, **figures: float) -> None:
        """Report that `done` of `total` steps are done."""
        now = time.monotonic()
        if self._first is None:
            self._first = done - 1
        if self._bar is None and now - self._last < self.every and done < self.total:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._start, 1e-9)
        speed = f"{rate * self.batch:.0f} img/s" if self.batch else f"{rate:.1f}/s"
        epoch = f"epoch {-(-done // self.epoch)}" if self.epoch else ""
        words = (epoch, speed, *(f"{name} {value:.4g}" for name, value in figures.items()))
        text = "  ".join(filter(None, words))
        if self._bar is not None:
            self._bar.update(self._task, completed=done, text=text)
        elif not self.quiet:
            print(f"{self.what} {done}/{self.total}  {text}", flush=True)
