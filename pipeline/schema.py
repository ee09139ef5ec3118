"""Is a file that came from elsewhere what its schema in docs/schemas says?"""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

from pipeline.errors import UserError

FOLDER = Path(__file__).parents[1] / "docs" / "schemas"


def check(path: Path, document: Any) -> None:
    """Raises UserError: no object, a schema of no name here, or the first place where the file departs from it."""
    name = document.get("schema") if isinstance(document, dict) else None
    validators = _validators()
    if name not in validators:
        raise UserError(f"{path}: schema is {name!r}; allowed: {', '.join(sorted(validators))}")
    errors = sorted(validators[name].iter_errors(document), key=lambda error: error.json_path)
    if errors:
        said = errors[0].message
        said = said if len(said) <= 200 else f"{said[:100]} ... {said[-100:]}"
        raise UserError(
            f"{path}: not as {name} says at {errors[0].json_path}: {said}; write it again"
        )


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
