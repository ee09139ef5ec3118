"""Runs a command line: the exit codes, one line on stderr for a user's mistake, a traceback for a bug."""

from __future__ import annotations

import argparse
import ctypes
import errno
import io
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.core.errors import GateFailed, UserError

DONE, BUG, USER_MISTAKE, GATE = 0, 1, 2, 3
DISK_ERRNOS = {
    errno.ENOSPC,
    errno.EDQUOT,
    errno.EFBIG,
    errno.EROFS,
    errno.EACCES,
    errno.EPERM,
    errno.EFBIG,
}  # no fault of the program
NAME_ERRNOS = {
    errno.EISDIR,
    errno.ENOTDIR,
    errno.ENAMETOOLONG,
    errno.ELOOP,
}  # a path that cannot be meant
MAX_MESSAGE_CHARS = 1500  # characters of a message
PR_SET_PDEATHSIG = 1


def run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
    launch: str | None = None,
) -> NoReturn:
    """Parse `argv`, call `main(args)` and exit: 0 done, 2 user's mistake, 3 gate failed, 1 (traceback) bug.

    `launch` names the module that may run as several processes (`relaunch`).
    """
    for stream in (
        sys.stdout,
        sys.stderr,
    ):  # a name is printed in any terminal, escaped where it must be
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    args = parser.parse_args(argv)
    try:
        if launch is not None:
            relaunch(launch)
        main(args)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except UserError as error:
        _say(parser, error)
        sys.exit(USER_MISTAKE)
    except GateFailed as error:
        _say(parser, error)
        sys.exit(GATE)
    except OSError as error:
        if error.errno not in DISK_ERRNOS | NAME_ERRNOS:
            raise
        remedy = (
            "free space or choose a writable place"
            if error.errno in DISK_ERRNOS
            else "give another"
        )
        _say(parser, f"{error.filename or 'writing'}: {error.strerror}; {remedy}, run again")
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(DONE)


LAUNCH = "CAKD_LAUNCH"
LAUNCHED = "CAKD_LAUNCHED"


def relaunch(module: str) -> None:
    """Where CAKD_LAUNCH names a launcher, become `<launcher> -m <module> <the same arguments>`.

    `torchrun --nproc-per-node 4`, or `srun --ntasks 8 python`: so `cmd` in dvc.yaml is the same for one process
    and for many. Raises UserError: no such launcher.
    """
    launcher = shlex.split(os.environ.get(LAUNCH, ""))
    if not launcher or LAUNCHED in os.environ:
        return
    os.environ[LAUNCHED] = "1"
    try:
        os.execvp(launcher[0], [*launcher, "-m", module, *sys.argv[1:]])
    except FileNotFoundError:
        raise UserError(
            f"{LAUNCH}: no such launcher {launcher[0]!r}; unset it, or give its path"
        ) from None


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux to send this process a signal when its parent dies: a killed dvc leaves no orphan behind."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _say(parser: argparse.ArgumentParser, error: Exception | str) -> None:
    words = " ".join(str(error).split())
    if len(words) > MAX_MESSAGE_CHARS:  # what went wrong stands in front, what to do at the end
        words = f"{words[: MAX_MESSAGE_CHARS // 2]} ... {words[-MAX_MESSAGE_CHARS // 2 :]}"
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    print(f"{parser.prog}: error: {line}", file=sys.stderr)


def count(text: str) -> int:
    """A count from 1 on, of a command line. Raises ArgumentTypeError on anything else."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; allowed: 1 or more")
    return value
