"""docs/troubleshooting.md has the words of our messages: a stranger who searches for one finds it."""

from __future__ import annotations

import ast

import pytest

from tests import house
from tests.house import ROOT

ROOMS = ("data", "models", "training", "store", "evaluate", "project", "teach")
FOLDERS = (*(f"pipeline.{room}" for room in ROOMS), "stages")
PAGE = " ".join((ROOT / "docs" / "troubleshooting.md").read_text(encoding="utf-8").split())
VALUE = "\0"


def messages():
    """Module, line and text of every UserError, VALUE for each interpolated value."""
    for name, path in house.modules().items():
        if not name.startswith(FOLDERS):
            continue
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                yield name, node.lineno, text(node.args[0])


def text(node):
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    return "".join(str(p.value) if isinstance(p, ast.Constant) else VALUE for p in parts)


def words(message):
    """The longest part without values of what was got, the first clause of a message."""
    return max(message.split("; ")[0].split(VALUE), key=len).strip(" :'(),")


@pytest.mark.parametrize(("module", "line", "message"), sorted(messages()))
def test_every_message_is_on_the_page(module, line, message):
    assert words(message) in PAGE, f"{module}:{line}: {words(message)!r}"


def test_the_words_of_a_message_are_those_of_its_mistake():
    assert words(f"{VALUE}: classes: got {VALUE}; expected {VALUE} names; run it") == "classes: got"
    assert words(f"{VALUE}: no such file; run the stage") == "no such file"
