"""The house as its imports show it: every module of ours and what it imports, read from the source alone."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

ROOT = Path(__file__).parents[1]
FLOORS = ("pipeline", "exporters", "stages", "benchmarks")  # each may import those before it


@cache
def modules() -> dict[str, Path]:
    """Dotted name -> file of every module of ours; a package is its __init__.py."""
    found = {}
    for floor in FLOORS:
        for path in sorted((ROOT / floor).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> set[str]:
    """Our modules that a file imports anywhere, in its functions too."""
    known = modules()
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = path.relative_to(ROOT).parts[: -node.level] if node.level else ()
            module = ".".join([*above, *filter(None, [node.module])])
            names = {module} | {f"{module}.{alias.name}" for alias in node.names}
        else:
            continue
        for name in names:
            parts = name.split(".")
            found |= {p for i in range(len(parts)) if (p := ".".join(parts[: i + 1])) in known}
    return found


def closure(name: str) -> set[str]:
    """A module and all of ours that it can come to import, function-level imports included."""
    known, seen, todo = modules(), set(), [name]
    while todo:
        current = todo.pop()
        if current in seen:
            continue
        seen.add(current)
        todo += imports(known[current]) - seen
    return seen


def room(module: str) -> str:
    """The path under which dvc.yaml lists a module: a folder or file of pipeline/, all of exporters/, a stage."""
    path = modules()[module].relative_to(ROOT)
    if path.parts[0] == "exporters":
        return "exporters"
    return "/".join(path.parts[:2])


def rooms(name: str) -> set[str]:
    """The rooms that a module's closure reaches, without the packages' own bare __init__.py."""
    return {room(module) for module in closure(name) if module not in FLOORS}
