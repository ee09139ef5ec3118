"""Command lines of ours: run in this process, where the imports are paid for, or as a process of their own."""

from __future__ import annotations

import contextlib
import ctypes
import io
import logging
import os
import random
import runpy
import signal
import subprocess
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from subprocess import CompletedProcess
from typing import IO

import numpy as np

from tests.house import ROOT

WITHOUT_TORCH = (
    "import runpy, sys; sys.modules['torch'] = None; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)
# Python shows these to nobody who runs a command.
UNSEEN = (DeprecationWarning, PendingDeprecationWarning, ImportWarning, ResourceWarning)


def process(
    module: str, *argv: object, torch: bool = True, **environment: str
) -> CompletedProcess[str]:
    """A module of ours as a process; `torch=False` blocks torch in it."""
    start = ["-m"] if torch else ["-c", WITHOUT_TORCH]
    line = [sys.executable, *start, module, *map(str, argv)]
    full = {**os.environ, **environment}
    return subprocess.run(line, cwd=ROOT, env=full, capture_output=True, text=True)


def here(
    module: str, *argv: object, folder: Path = ROOT, **environment: str
) -> CompletedProcess[str]:
    """The same in this process, in `folder`: exit code, stdout and stderr, of libraries below Python too.

    What a process takes with it when it ends is put back: argv, environment, folder, signals, warnings, torch.
    """
    line = [module, *map(str, argv)]
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err, restored():
        os.environ.update(environment)
        os.chdir(folder)
        sys.argv = line
        with redirected(out, err):
            code = ended(lambda: runpy.run_module(module, run_name="__main__", alter_sys=True))
        texts = [text(file) for file in (out, err)]
    return CompletedProcess(line, code, *texts)


def ended(run: Callable[[], object]) -> int:
    """The exit code that a call would give its process; a traceback on stderr and 1 where it raises."""
    try:
        run()
    except SystemExit as left:
        if isinstance(left.code, str):
            print(left.code, file=sys.stderr)
            return 1
        return left.code or 0
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def text(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


@contextlib.contextmanager
def redirected(out: IO[bytes], err: IO[bytes]) -> Iterator[None]:
    """Descriptors 1 and 2, `sys.stdout` and `sys.stderr` and the handlers of logging lead to these files."""
    flush()
    before, streams = [os.dup(n) for n in (1, 2)], (sys.stdout, sys.stderr)
    try:
        for number, file in ((1, out), (2, err)):
            os.dup2(file.fileno(), number)
        sys.stdout, sys.stderr = stream(1, "strict"), stream(2, "backslashreplace")
        for handler in handlers():
            if handler.stream in streams:
                handler.setStream((sys.stdout, sys.stderr)[streams.index(handler.stream)])
        yield
    finally:
        flush()
        sys.stdout, sys.stderr = streams
        for number, kept in zip((1, 2), before, strict=True):
            os.dup2(kept, number)
            os.close(kept)


def stream(number: int, errors: str) -> io.TextIOWrapper:
    """A text file on a descriptor. It is never closed: a library that keeps it writes on to where that leads."""
    raw = io.BufferedWriter(io.FileIO(number, "w", closefd=False))
    return io.TextIOWrapper(raw, encoding="utf-8", errors=errors, line_buffering=True)


def flush() -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    ctypes.CDLL(None).fflush(None)


def handlers() -> list[logging.StreamHandler]:
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    found = [h for logger in loggers for h in getattr(logger, "handlers", ())]
    return [h for h in found if isinstance(h, logging.StreamHandler)]


@contextlib.contextmanager
def restored() -> Iterator[None]:
    """Whatever a command changes of its process is afterwards as it was."""
    argv, environment, folder = sys.argv, dict(os.environ), Path.cwd()
    signals = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
    draws, numbers = random.getstate(), np.random.get_state()
    torch = sys.modules.get("torch")
    torch_state = (torch.get_rng_state(), torch.get_num_threads()) if torch else None
    try:
        with warnings.catch_warnings():
            for kind in UNSEEN:
                warnings.simplefilter("ignore", kind)
            warnings.filterwarnings("ignore", ".*found in sys.modules")
            warnings.showwarning = show
            yield
    finally:
        sys.argv = argv
        for name in set(os.environ) - set(environment):
            del os.environ[name]
        os.environ.update(environment)
        os.chdir(folder)
        for number, handler in signals.items():
            signal.signal(number, handler)
        random.setstate(draws)
        np.random.set_state(numbers)
        if torch and torch_state:
            torch.set_rng_state(torch_state[0])
            torch.set_num_threads(torch_state[1])


def show(message, category, filename, lineno, file=None, line=None) -> None:
    """A warning on stderr, as outside of pytest."""
    print(warnings.formatwarning(message, category, filename, lineno, line), file=sys.stderr)
