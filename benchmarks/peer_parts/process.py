"""The process of a peer, as its parent sees it."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

Measured = dict[str, float]  # images, wall_s, data_s, cpu_s


class PeerError(Exception):
    """The reason why a peer has no figures."""


class Worker:
    """The process of a peer; every answer is awaited for `timeout` seconds."""

    def __init__(self, command: list[str], threads: int, log: Path, timeout: float) -> None:
        self._timeout, self._log = timeout, log
        self._answers: queue.Queue[str | None] = queue.Queue()
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=environment,
            )
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._answers.put(line)
        self._answers.put(None)

    def answer(self) -> dict[str, Any]:
        """Return the next answer. Raises PeerError: none in time, no JSON, or the process ended."""
        try:
            line = self._answers.get(timeout=self._timeout)
        except queue.Empty:
            self._process.kill()
            raise PeerError(f"no answer in {self._timeout:g} s") from None
        if line is None:
            self._answers.put(None)  # for whoever asks again
            last = self._log.read_text(errors="replace").strip().splitlines()[-1:]
            raise PeerError(f"ended with {self._process.wait()}: {''.join(last)[:200]}")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise PeerError(f"answered {line[:100]!r}") from None
        return answer

    def steps(self, method: str, count: int) -> Measured:
        """Make steps of a method. Raises PeerError."""
        assert self._process.stdin is not None
        with suppress(OSError):  # of a process that has ended: `answer` has the reason
            self._process.stdin.write(json.dumps({"method": method, "steps": count}) + "\n")
            self._process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.kill()
        self._process.wait()
        self._listener.join(timeout=5)
        for stream in (self._process.stdin, self._process.stdout):
            with suppress(OSError):  # of a request that was not read
                stream.close()
