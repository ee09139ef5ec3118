"""Figures of a run -> one summary with verdicts, shown as Markdown, as a page, and for other services."""
