"""JSON artefacts with schema and provenance; hashes of files, of values and of the code behind a stage."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

from pydantic import ValidationError

from pipeline.core import config
from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError
from pipeline.core.validation import Format, schema_name

PACKAGES = ("torch", "timm", "numpy", "pillow", "safetensors")
WIDTH = 115  # characters of a line of JSON
_ENCODE = json.JSONEncoder(allow_nan=False).encode


def write_json(path: Path | str, value: dict[str, Any]) -> None:
    """Write JSON atomically in the layout of `json_text`. Raises ValueError: NaN or Infinity."""
    with atomic(path) as temporary:
        temporary.write_text(json_text(value) + "\n", encoding="utf-8")


def json_text(value: Any, depth: int = 0, before: int = 0) -> str:
    """Format JSON with lines filled up to WIDTH; keys keep their order.

    A list or object that fits stays on one line, so that a diff shows a changed row as one line. depth: levels
    above, a space of indentation each; before: characters left of the value on its line.
    Raises ValueError: NaN or Infinity.
    """
    text = _ENCODE(value)
    if not isinstance(value, dict | list | tuple) or depth + before + len(text) < WIDTH:
        return text
    if isinstance(value, dict):
        entries = [(_ENCODE({key: 0})[1:-2], item) for key, item in value.items()]
    else:
        entries = [("", item) for item in value]
    lines = [""]
    for key, item in entries:
        entry = f"{key}{json_text(item, depth + 1, len(key))},"
        room = WIDTH - depth - 2 - len(lines[-1])
        if lines[-1] and ("\n" in entry or "\n" in lines[-1] or len(entry) > room):
            lines.append(entry)
        else:
            lines[-1] += f" {entry}" if lines[-1] else entry
    inside = "\n".join(f"{' ' * (depth + 1)}{line}" for line in lines)[:-1]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n{inside}\n{' ' * depth}{end}"


def rounded(value: Any, digits: int = 6) -> Any:
    """Round every float of a JSON-able value to `digits` significant digits."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def read_json(path: Path | str, schema: str | None = None) -> dict[str, Any]:
    """Read a JSON artefact, whose `schema` field must be `schema` where one is given.

    Raises UserError: file missing, not JSON, another schema.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; expected the output of an earlier stage; run `dvc repro`"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); remove it and run its stage again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(
            f"{path}: got a JSON {type(value).__name__}; expected an object; run its stage again"
        )
    if schema is not None and value.get("schema") != schema:
        raise UserError(
            f"{path}: schema: got {value.get('schema')!r}; expected {schema!r}; run its stage again"
        )
    return value


def read(
    path: Path | str, kind: type[Format], remedy: str = "run its stage again"
) -> dict[str, Any]:
    """Read a JSON artefact as `kind` describes it; keys that `kind` does not know stay in it.

    Raises UserError: missing, not JSON, or the first value that `kind` refuses, with `remedy`.
    """
    return check(read_json(path, schema_name(kind)), kind, path, remedy)


def check(
    value: dict[str, Any], kind: type[Format], path: Path | str, remedy: str = "run its stage again"
) -> dict[str, Any]:
    """Check a JSON object read from `path`. Raises UserError: it is not as `kind` describes it."""
    try:
        kind.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{path}: {config.explain(error, kind, value, remedy=remedy)}") from None
    return value


def _no_number(name: str) -> None:
    """Raise ValueError: Python's reader takes NaN and Infinity, which JSON does not have."""
    raise ValueError(f"{name} is not a JSON number")


def expect(value: Any, path: Path | str, remedy: str, **kinds: type | UnionType) -> None:
    """Check keys of a JSON object and the types of their values. Raises UserError: missing, or another type."""
    for key, kind in kinds.items():
        got = value.get(key) if isinstance(value, dict) else value
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            name = getattr(kind, "__name__", kind)
            raise UserError(
                f"{path}: damaged: {key}: got {reprlib.repr(got)}; expected {name}; {remedy}"
            )


def sha256(path: Path | str) -> str:
    """Hash the bytes of a file: hex SHA-256."""
    with Path(path).open("rb") as f:
        return _hash_stream(f)


def _hash_stream(f: BinaryIO) -> str:
    state = hashlib.sha256()
    while block := f.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def digest(value: Any) -> str:
    """Hash a JSON-able value, independent of key order: hex SHA-256, the fingerprint of parameters and inputs."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code(rooms: Iterable[str]) -> str:
    """Hash the source of these rooms of pipeline/ (`training`, `teach.py`): hex SHA-256.

    Part of the name of a work folder: what other code left unfinished is not resumed.
    """
    library = Path(__file__).parents[1]
    files = [path for room in rooms for path in _sources(library / room)]
    return digest({path.relative_to(library).as_posix(): sha256(path) for path in files})


def _sources(room: Path) -> list[Path]:
    return [room] if room.is_file() else sorted(room.rglob("*.py"))


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Look up installed versions by distribution name, None where absent, without importing anything."""
    installed: dict[str, str | None] = {}
    for name in packages:
        try:
            installed[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            installed[name] = None
    return installed


def provenance(params: Any = None, **inputs: Path | str) -> dict[str, Any]:
    """Describe what made an artefact: parameters, the SHA-256 of each input file, package versions."""
    return {
        "params": params,
        "inputs": {name: sha256(path) for name, path in inputs.items()},
        "versions": versions(),
    }
