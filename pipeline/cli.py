"""Runs a command line: the exit codes, one line on stderr for a user's mistake, a traceback for a bug."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Sequence
from typing import NoReturn

from pipeline.errors import GateFailed, UserError

DONE, BUG, USER_MISTAKE, GATE = 0, 1, 2, 3


def run(
    main: Callable[[argparse.Namespace], None],
    parser: argparse.ArgumentParser,
    argv: Sequence[str] | None = None,
) -> NoReturn:
    """Parse `argv`, call `main(args)` and exit: 0 done, 2 user's mistake, 3 gate failed, 1 (traceback) bug."""
    args = parser.parse_args(argv)
    try:
        main(args)
    except UserError as error:
        _say(parser, error)
        sys.exit(USER_MISTAKE)
    except GateFailed as error:
        _say(parser, error)
        sys.exit(GATE)
    except KeyboardInterrupt:
        print(f"{parser.prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(DONE)


def _say(parser: argparse.ArgumentParser, error: Exception) -> None:
    line = " ".join(str(error).split())
    print(f"{parser.prog}: error: {line}", file=sys.stderr)
