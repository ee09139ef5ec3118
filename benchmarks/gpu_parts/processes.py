"""A command in its own process group, with a time limit and a log."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

from pipeline.core import cli

GRACE = 3.0  # seconds between SIGTERM and SIGKILL
Status = Literal["done", "failed", "killed", "skipped"]


@dataclass(frozen=True)
class Outcome:
    """How a process ended: `failed` with its last line, `killed` at its limit."""

    status: Status
    seconds: float = 0.0
    reason: str | None = None


def run(command: Sequence[str], log: Path, limit: float, environment: Mapping[str, str]) -> Outcome:
    """Run a command with both streams in `log`; end it and its children at its limit or on an interrupt."""
    start = time.monotonic()
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=stream,
            stderr=subprocess.STDOUT,
            env=dict(environment),
            start_new_session=True,
            preexec_fn=partial(cli.die_with_parent, signal.SIGKILL),
        )
        try:
            code = process.wait(timeout=max(limit, 0.0))
        except subprocess.TimeoutExpired:
            code = None
        finally:
            if process.returncode is None:
                end(process)
    seconds = time.monotonic() - start
    if code is None:
        return Outcome("killed", seconds, f"killed at its limit of {limit:.0f} s: {last_line(log)}")
    if code:
        return Outcome("failed", seconds, f"exit {code}: {last_line(log)}")
    return Outcome("done", seconds)


def end(process: subprocess.Popen[bytes]) -> None:
    """Send SIGTERM to the process group, then SIGKILL to the rest of it."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        with suppress(subprocess.TimeoutExpired):
            process.wait(timeout=GRACE)


def last_line(log: Path) -> str:
    """The last line of a log that is not empty."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "no output")
