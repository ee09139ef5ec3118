"""The commands of the README and of docs/, as a reader would copy them."""

from __future__ import annotations

import re
from collections.abc import Iterator

from tests.house import ROOT

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```sh\n(.*?)^```", re.MULTILINE | re.DOTALL)
COMMENT = re.compile(r"(^|\s{2,})#.*$")


def commands() -> list[str]:
    """Every command of every shell block, its lines joined, without comments; a here-document whole."""
    return [
        command
        for page in PAGES
        for block in BLOCK.findall(page.read_text(encoding="utf-8"))
        for command in _split(block.splitlines())
    ]


def _split(lines: list[str]) -> Iterator[str]:
    end, command = "", ""
    for line in lines:
        if end:
            command += f"\n{line}"
        elif text := COMMENT.sub("", line).rstrip():
            command += text.strip() if command else text
            if here := re.search(r"<<'?(\w+)'?$", text):
                end = here[1]
            elif text.endswith("\\"):
                command = command[:-1]
                continue
        if command and (not end or line == end):
            yield command
            end, command = "", ""
