"""Is a file that came from elsewhere what its schema in docs/schemas says?"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.core.errors import UserError

FOLDER = Path(__file__).parents[2] / "docs" / "schemas"
MAX_MESSAGE_CHARS = 200  # letters of what is said of a wrong value, which may be a whole list


def check(path: Path, document: dict[str, Any], allowed: Sequence[str]) -> None:
    """Raises UserError: a schema that is not `allowed`, or the first place where the file departs from its own."""
    name: Any = document.get("schema")
    if name not in allowed:
        said = f"schema is {_short(repr(name))}"
        raise UserError(f"{path}: {said}; allowed: {', '.join(allowed)}")
    if name not in _validators():
        raise UserError(
            f"{FOLDER}: holds no schema of {name}; this checkout is not whole, clone it again"
        )
    errors = _validators()[name].iter_errors(document)
    if first := min(errors, key=lambda error: error.json_path, default=None):
        raise UserError(
            f"{path}: not as {name} says at {_short(first.json_path)}: {_short(first.message)}; write it again"
        )


def _short(text: str) -> str:
    """The text without its middle where it is long."""
    half = MAX_MESSAGE_CHARS // 2
    return text if len(text) <= MAX_MESSAGE_CHARS else f"{text[:half]} ... {text[-half:]}"


@cache
def _validators() -> dict[str, Any]:
    """Schema name and version -> its validator; references are resolved in the folder, never fetched."""
    from jsonschema import Draft202012Validator
    from referencing import Registry, Resource

    schemas = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(FOLDER.glob("*.json"))]
    registry = Registry().with_resources((s["$id"], Resource.from_contents(s)) for s in schemas)
    return {
        s["properties"]["schema"]["const"]: Draft202012Validator(s, registry=registry)
        for s in schemas
        if "schema" in s.get("properties", {})
    }
