"""The two errors that are not a bug: a user's mistake (exit code 2) and a failed gate (exit code 3)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, as one line: `what: got X; expected Y; do Z`. The command line exits 2."""


class GateFailed(Exception):
    """A measured figure outside its gate (parity, accuracy, latency, budget). The command line exits 3."""


def nearest(got: object, allowed: Iterable[str]) -> str:
    """Format `allowed: a, b, c`, with `did you mean 'b'?` in front where one of them is close to `got`."""
    names = list(allowed)
    close = difflib.get_close_matches(str(got), names, n=1, cutoff=0.6)
    close = close or [name for name in names if got and name.startswith(str(got))]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names) if names else 'nothing'}"
