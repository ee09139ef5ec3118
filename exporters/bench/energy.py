"""Energy of a call: mean power over the blocks of a row, by RAPL or tegrastats, times the wall time of a call.

Both meters see the whole package or board: its idle power, the idle workers and every other process are in the
figure. `idle_watts`, read while all workers are loaded and wait, says how much of it that is.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from exporters.bench.conditions import BOARD_POWER
from exporters.device.timing import Block, significant
from pipeline.core.machine import ROOT, TOOL_SECONDS, read_text

POWERCAP = "sys/class/powercap"
IDLE_SECONDS = 0.5
TEGRASTATS_MS = 50  # between two lines: a block of 150 ms has two or three


class Unreadable(Exception):
    """A meter that cannot be read here; the text is the reason shown in the rows."""


class Meter:
    """Mean power since `begin`. This one has none to read, for `reason`."""

    source: str | None = None
    sees_gpu = True
    idle_watts: float | None = None

    def __init__(self, reason: str | None = None) -> None:
        self.reason = reason

    def begin(self) -> None:
        """Begin an interval."""

    def watts(self) -> float | None:
        """Mean power of the interval in W; None where it could not be read."""
        return None

    def close(self) -> None:
        """End what reads it."""

    def measure_idle(self) -> None:
        """Read `idle_watts` over IDLE_SECONDS in which nothing of ours runs."""
        if self.source:
            self.begin()
            time.sleep(IDLE_SECONDS)
            self.idle_watts = self.watts()


class Rapl(Meter):
    """The energy counters of all CPU packages. Raises Unreadable: not there, or root's only."""

    source = "RAPL, CPU package"
    sees_gpu = False

    def __init__(self, root: Path = ROOT) -> None:
        super().__init__()
        folder = root / POWERCAP
        if not folder.is_dir():
            raise Unreadable(f"RAPL: /{POWERCAP}: not there")
        # `intel-rapl:0` is a package, on AMD too; `intel-rapl:0:0` a part of it, `intel-rapl-mmio:0` it again.
        domains = [p for p in folder.iterdir() if re.fullmatch(r"intel-rapl:\d+", p.name)]
        packages = [p for p in domains if (read_text(p / "name") or "").startswith("package")]
        if not packages:
            raise Unreadable(f"RAPL: /{POWERCAP}: no package domain")
        self._counters = [p / "energy_uj" for p in sorted(packages)]
        try:
            self._limits = [
                _microjoules(p.with_name("max_energy_range_uj")) for p in self._counters
            ]
            if not all(self._limits):
                raise ValueError(f"max_energy_range_uj: got {self._limits}; expected above 0")
            self._read()
        except PermissionError as error:
            path = Path(error.filename).relative_to(root)
            raise Unreadable(f"RAPL: /{path}: not readable without root") from None
        except (OSError, ValueError) as error:
            raise Unreadable(f"RAPL: /{POWERCAP}: not readable ({error})") from None
        self.begin()

    def _read(self) -> list[int]:
        return [_microjoules(path) for path in self._counters]

    def begin(self) -> None:
        """Read the counters and the clock."""
        self._before = []
        with suppress(OSError, ValueError):
            self._before = self._read()
        self._began = time.monotonic()

    def watts(self) -> float | None:
        """Energy since `begin` over its time; None too where the counters stand still."""
        with suppress(OSError, ValueError):
            counters = zip(self._read(), self._before, self._limits, strict=True)
            # A counter starts again at 0 beyond its limit, which takes a minute at the least.
            microjoules = sum((now - before) % limit for now, before, limit in counters)
            return microjoules / 1e6 / (time.monotonic() - self._began) or None
        return None


def _microjoules(path: Path) -> int:
    return int(path.read_text(encoding="ascii"))


class Tegrastats(Meter):
    """Power of a Jetson's board, GPU included. Raises Unreadable: no such tool, no power in its lines."""

    source = "tegrastats, board"

    def __init__(self) -> None:
        super().__init__()
        tool = shutil.which("tegrastats")
        if tool is None:
            raise Unreadable("tegrastats: not there")
        self._lines: list[float] = []
        self._first = threading.Event()
        try:
            self._process = subprocess.Popen(
                [tool, "--interval", str(TEGRASTATS_MS)], stdout=subprocess.PIPE, text=True
            )
        except OSError as error:
            raise Unreadable(f"tegrastats: does not start ({error})") from None
        self._reader = threading.Thread(target=self._follow, daemon=True)
        self._reader.start()
        if not self._first.wait(TOOL_SECONDS) or not self._lines:
            self.close()
            raise Unreadable(f"tegrastats: no power of the board within {TOOL_SECONDS:g} s")

    def _follow(self) -> None:
        assert self._process.stdout
        with self._process.stdout as lines:
            for line in lines:
                if power := BOARD_POWER.search(line):
                    self._lines.append(int(power[1]) / 1000)
                    self._first.set()
        self._first.set()  # it has ended: nothing more to wait for

    def begin(self) -> None:
        """Forget the lines so far."""
        self._lines.clear()

    def watts(self) -> float | None:
        """Mean of the lines since `begin`; None without one."""
        lines = list(self._lines)
        return float(np.mean(lines)) if lines else None

    def close(self) -> None:
        """End the tool."""
        self._process.kill()
        self._process.wait()
        self._reader.join(TOOL_SECONDS)


def find_meter(root: Path = ROOT) -> Meter:
    """The first meter that can be read here, to be closed; else one that says why there is none."""
    reasons = []
    for meter in (lambda: Rapl(root), Tegrastats):
        try:
            return meter()
        except Unreadable as error:
            reasons.append(str(error))
    return Meter("; ".join(reasons))


def energy_of(
    meter: Meter, blocks: Sequence[Block], watts: Sequence[float | None], on_gpu: bool
) -> dict[str, Any]:
    """`source`, `watts` of the blocks, `idle_watts`, `joules_per_call`, and the `reason` where they are None.

    watts: of each block, None where it was not read. Blocks count by the wall time of their calls.
    """
    nothing = dict.fromkeys(("source", "watts", "idle_watts", "joules_per_call"))
    if meter.reason:
        return {**nothing, "reason": meter.reason}
    if on_gpu and not meter.sees_gpu:
        return {**nothing, "reason": f"{meter.source}: leaves out the GPU"}
    read = [(w, block) for w, block in zip(watts, blocks, strict=True) if w is not None]
    if not read:
        return {**nothing, "reason": f"{meter.source}: no reading in any block"}
    milliseconds = [sum(block.wall_ms) for _, block in read]
    mean = float(np.average([w for w, _ in read], weights=milliseconds))
    calls = sum(len(block.wall_ms) for _, block in read)
    return {
        "source": meter.source,
        "watts": significant(mean),
        "idle_watts": meter.idle_watts and significant(meter.idle_watts),
        "joules_per_call": significant(mean * sum(milliseconds) / 1000 / calls),
        "reason": None,
    }
