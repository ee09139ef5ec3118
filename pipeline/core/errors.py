"""The two ways a run may end that are not a bug: a user's mistake (exit 2) and a failed gate (exit 3)."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """A mistake in the input, told in one line: what, got, allowed, what to do. The command line exits 2."""


class GateFailed(Exception):
    """A measured figure breaks its gate (parity, accuracy, latency, budget). The command line exits 3."""


def nearest(got: object, allowed: Iterable[str]) -> str:
    """`allowed: a, b, c` with `did you mean 'b'?` in front where one of them is close to `got`."""
    names = list(allowed)
    close = difflib.get_close_matches(str(got), names, n=1, cutoff=0.6)
    close = close or [name for name in names if got and name.startswith(str(got))]
    hint = f"did you mean {close[0]!r}? " if close else ""
    return f"{hint}allowed: {', '.join(names) if names else 'nothing'}"
