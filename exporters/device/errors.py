"""Exceptions that end a run without being a bug: a user's mistake (exit 2) and a failed gate (exit 3)."""

from __future__ import annotations


class UserError(Exception):
    """A mistake in the input or on the device, in one line: what, got, expected, what to do."""


class GateFailed(Exception):
    """The outputs are not those of the model that was bundled."""


class Named:
    """Base of classes whose messages begin with `name`. The exporters replace `error` by their own."""

    name: str

    def error(self, message: str) -> Exception:
        """The exception to raise."""
        return UserError(f"{self.name}: {message}")


def one_line(error: object, limit: int = 300) -> str:
    """A library's message without line breaks; of a long one the end, where the reason usually is."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"...{text[-limit:]}"
