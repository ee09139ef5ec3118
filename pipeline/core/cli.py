"""Command lines: exit codes, one line on stderr for a user's mistake, a traceback for a bug."""

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
# The machine's or the path's fault: one line and exit 2. Any other OSError is a bug and keeps its traceback.
DISK_ERRNOS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}
PATH_ERRNOS = {
    errno.EISDIR: "got a directory; expected a file",
    errno.ENOTDIR: "a part of the path is a file; expected a directory",
    errno.ENAMETOOLONG: "the name is too long; expected a shorter path",
    errno.ELOOP: "too many symbolic links; expected a path without a loop",
}
MAX_MESSAGE_CHARS = 1500
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
        _print_error(parser, error)
        sys.exit(USER_MISTAKE)
    except GateFailed as error:
        _print_error(parser, error)
        sys.exit(GATE)
    except OSError as error:
        if error.errno in DISK_ERRNOS:
            reason = f"{error.strerror}; free space or choose a writable path, run again"
        elif error.errno in PATH_ERRNOS:
            reason = f"{PATH_ERRNOS[error.errno]}; correct the path"
        else:
            raise
        _print_error(parser, f"{error.filename or 'writing'}: {reason}")
        sys.exit(USER_MISTAKE)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(DONE)


LAUNCH = "CAKD_LAUNCH"
LAUNCHED = "CAKD_LAUNCHED"


def relaunch(module: str) -> None:
    """Replace this process by `<launcher> -m <module> <the same arguments>` where CAKD_LAUNCH names a launcher.

    `torchrun --nproc-per-node 4`, or `srun --ntasks 8 python`. So dvc.yaml has one `cmd`, whether a stage runs in
    one process or in many. Raises UserError: the launcher is not installed.
    """
    launcher = shlex.split(os.environ.get(LAUNCH, ""))
    if not launcher or LAUNCHED in os.environ:
        return
    os.environ[LAUNCHED] = "1"
    try:
        os.execvp(launcher[0], [*launcher, "-m", module, *sys.argv[1:]])
    except FileNotFoundError:
        raise UserError(
            f"{LAUNCH}: got {launcher[0]!r}, which is not installed; expected a launcher such as torchrun; unset "
            "the variable or give the launcher's path"
        ) from None


def die_with_parent(number: signal.Signals = signal.SIGTERM) -> None:
    """Ask Linux to send this process a signal when its parent dies, so that a killed dvc leaves no orphan."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, number)


def _print_error(parser: argparse.ArgumentParser, error: Exception | str) -> None:
    message = " ".join(str(error).split())
    # Cut in the middle: a message begins with what went wrong and ends with what to do.
    if len(message) > MAX_MESSAGE_CHARS:
        message = f"{message[: MAX_MESSAGE_CHARS // 2]} ... {message[-MAX_MESSAGE_CHARS // 2 :]}"
    line = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in message)
    print(f"{parser.prog}: error: {line}", file=sys.stderr)


def count(text: str) -> int:
    """Parse a command-line count of at least 1. Raises ArgumentTypeError: anything else."""
    if (value := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"got {text}; expected 1 or more")
    return value
