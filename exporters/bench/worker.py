"""Worker process of `exporters.bench`, which holds one artefact: both ends of its pipe.

A request is a JSON line, `{"do": "block", "seconds": 0.15}`, an answer another; an error is answered with
`{"error": "..."}`. A process that dies (a segmentation fault in a runtime, the OOM killer) fails its own row only.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from subprocess import PIPE
from typing import IO, Any, TextIO
from zipfile import BadZipFile

import numpy as np

from exporters.artifact import inputs
from exporters.artifact.placement import unplaced
from exporters.artifact.session import TARGETS, Array, Session, Target
from exporters.device import timing
from exporters.open import RUNTIMES, open_session
from pipeline.core.errors import UserError

ROOT = Path(__file__).parents[2]
COMMAND = (sys.executable, "-m", "exporters.bench.worker")
ANSWER_SECONDS = 600.0  # a first load may compile
IMAGES = 16
# Thread pools of libraries other than the runtime: they would compete with its own threads.
POOLS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


class WorkerFailed(Exception):
    """The worker cannot go on; the text is the reason shown in its row."""


@contextmanager
def start_worker(
    artefact: Path,
    target: Target,
    threads: int,
    reference: Path | None = None,
    batch: int | None = None,
) -> Iterator[Worker]:
    """A worker that ends with the block. It imports and loads nothing before `ask("open")`.

    reference: an .npz whose `x` holds the images to run; None: seeded smooth ones.
    batch: images per call; None: the artefact's fixed batch, or 1.
    """
    command = [*COMMAND, str(artefact), "--target", target.name, "--threads", str(threads)]
    command += ["--reference", str(reference)] if reference else []
    command += ["--batch", str(batch)] if batch else []
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, **dict.fromkeys(POOLS, str(threads))}
    with (
        tempfile.TemporaryFile() as stderr,
        subprocess.Popen(
            command, stdin=PIPE, stdout=PIPE, stderr=stderr, text=True, env=environment
        ) as process,
    ):
        try:
            yield Worker(process, stderr)
        finally:
            _end(process)


def _end(process: subprocess.Popen[str]) -> None:
    """End a worker by closing its input; one that hangs is killed."""
    assert process.stdin
    with suppress(BrokenPipeError):
        process.stdin.close()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()


@dataclass(frozen=True)
class Worker:
    """The parent's end of the pipe."""

    process: subprocess.Popen[str]
    stderr: IO[bytes]

    def ask(self, do: str, **arguments: Any) -> dict[str, Any]:
        """Send one request and wait for its answer. Raises WorkerFailed: an error, a death, no answer in time."""
        assert self.process.stdin and self.process.stdout
        deadline = threading.Timer(ANSWER_SECONDS, self.process.kill)
        began = time.monotonic()
        deadline.start()
        line = ""
        try:
            with suppress(BrokenPipeError):
                self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
                self.process.stdin.flush()
                line = self.process.stdout.readline()
        finally:
            deadline.cancel()
        if not line:
            late = time.monotonic() - began >= ANSWER_SECONDS
            raise WorkerFailed(
                f"no answer to '{do}' in {ANSWER_SECONDS:.0f} s" if late else self._death()
            )
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise WorkerFailed(answer["error"])
        return answer

    def _death(self) -> str:
        """How the process ended, with its last line on stderr."""
        code = self.process.wait()
        end = f"killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit {code}"
        self.stderr.seek(0)
        lines = self.stderr.read().decode(errors="replace").split("\n")
        last = next((line.strip() for line in reversed(lines) if line.strip()), "")
        return f"the worker was {end}" + (f": {last[:300]}" if last else "")


class RequestHandler:
    """The child's end of the pipe: a session, and one method per request."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.session: Session

    def open(self) -> dict[str, Any]:
        """Load, then run once: ms of both, without the import of the runtime, and the batch."""
        target = TARGETS[self.args.target]
        for name in RUNTIMES[target.runtime].packages:
            with suppress(ImportError):  # the session reports a missing package
                importlib.import_module(name)
        began = time.perf_counter()
        self.session = open_session(target, self.args.artefact, self.args.threads)
        loaded = time.perf_counter()
        self.engine_ms = getattr(self.session, "engine_ms", None)
        self.batches = input_batches(self.session, self.args.reference, self.args.batch)
        self.inputs = timing.cycle_inputs(self.batches)
        began_first = time.perf_counter()
        self.session.run(next(self.inputs))
        return {
            "load_ms": 1e3 * (loaded - began),
            "first_ms": 1e3 * (time.perf_counter() - began_first),
            "batch": len(self.batches[0]),
        }

    def warm_up(self) -> dict[str, Any]:
        """Warm up by the protocol, then read the memory of the process."""
        warm = timing.warm_up(self.session.run, self.inputs, engine=self.engine_ms)
        return {**vars(warm), "rss_mb": resident_mb()}

    def block(self, seconds: float) -> dict[str, Any]:
        """One timed block."""
        return vars(timing.run_block(self.session.run, self.inputs, seconds, self.engine_ms))

    def logits(self) -> dict[str, Any]:
        """Logits of the first images, for the parity check."""
        count = -(-IMAGES // len(self.batches[0]))
        logits = [self.session.run(x) for x in self.batches[:count]]
        return {"logits": np.concatenate(logits)[:IMAGES].tolist()}

    def describe(self) -> dict[str, Any]:
        """Runtime, precision, metadata; asked last, as reading the precision may load the artefact again."""
        return {
            "runtime": self.session.runtime,
            "precision_effective": self.session.precision_effective,
            "metadata": dict(self.session.metadata),
            **getattr(self.session, "counted", {}),
        }

    def placement(self) -> dict[str, Any]:
        """Which operators ran where, if the runtime says so."""
        if not hasattr(self.session, "placement"):
            return unplaced(f"{self.session.runtime} lists no operators")
        result: dict[str, Any] = self.session.placement()
        return result


def input_batches(
    session: Session, reference: Path | None, requested: int | None = None
) -> list[Array]:
    """At least MIN_INPUTS batches of the requested size, else of the artefact's fixed batch, or 1.

    Raises UserError: the reference holds no `x`, or `x` of another size than the input; another batch is fixed.
    """
    batch, *image = session.input_shape
    size = requested or batch or 1
    if batch not in (None, size):
        raise UserError(
            f"--batch: got {size}; the artefact's batch is fixed at {batch}; leave it out"
        )
    if reference is None:
        x = inputs.smooth_for(session, size * max(timing.MIN_INPUTS, IMAGES // size))
    else:
        x = read_reference(reference)[: size * IMAGES]
        if list(x.shape[1:]) != image:
            raise UserError(
                f"{reference}: x: got {x.shape}; expected (N, {', '.join(map(str, image))}); run export again"
            )
    return timing.batched_inputs(x, size)


def read_reference(path: Path) -> Array:
    """`x` (N, 3, S, S) float32 of reference.npz. Raises UserError: missing, no npz, no such array."""
    try:
        with np.load(path, allow_pickle=False) as file:
            x: Array = file["x"].astype(np.float32)
    except (OSError, EOFError, BadZipFile, ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path}: not an .npz with an array 'x' ({error}); run export again"
        ) from None
    if x.ndim != 4 or not len(x):
        raise UserError(
            f"{path}: x: got {x.shape}; expected (N, C, S, S), N >= 1; run export again"
        )
    return x


def resident_mb() -> float:
    """Resident memory of this process in 1e6 bytes; off Linux its peak."""
    with suppress(OSError):
        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
        return pages * resource.getpagesize() / 1e6
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def private_stdout() -> TextIO:
    """A stream on the real stdout; descriptor 1 goes to stderr, so that libraries cannot write answers."""
    stream = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return stream


def serve(handler: RequestHandler, requests: TextIO, answers: TextIO) -> None:
    """Answer requests until their end or the first error."""
    for line in requests:
        request = json.loads(line)
        do = request.pop("do")
        failed = False
        try:
            answer = getattr(handler, do)(**request)
        except Exception as error:  # an error of a runtime fails this row, not the bench
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            answer, failed = {"error": " ".join(f"{kind}{error}".split())[:500]}, True
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if failed:
            return


def main(argv: Sequence[str] | None = None) -> None:
    """Serve stdin. Started by `exporters.bench`, not by hand."""
    parser = argparse.ArgumentParser(prog="python -m exporters.bench.worker", description=__doc__)
    parser.add_argument("artefact", type=Path)
    parser.add_argument("--target", choices=TARGETS, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--reference", type=Path)
    parser.add_argument("--batch", type=int)
    args = parser.parse_args(argv)
    answers = private_stdout()
    serve(RequestHandler(args), sys.stdin, answers)


if __name__ == "__main__":
    main()
