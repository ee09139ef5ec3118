"""The two ways a run may end that are no bug: a user's mistake (exit 2) and a failed gate (exit 3)."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input or on the device, told in one line: what, got, allowed, what to do."""


class GateFailed(Exception):
    """The outputs are not those of the model that was shipped."""


class Named:
    """Base of what may fail: its messages begin with `name`. The exporters replace `error` by their own."""

    name: str

    def error(self, what: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {what}")


def one_line(error: object, limit: int = 300) -> str:
    """A library's message without its line breaks; of a long one the end, where the reason mostly stands."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"...{text[-limit:]}"
