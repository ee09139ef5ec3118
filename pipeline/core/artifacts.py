"""JSON artefacts that carry schema and provenance, hashes of files, of values and of the code behind a stage."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import reprlib
from collections.abc import Iterable
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

from pipeline.core.atomic import atomic
from pipeline.core.errors import UserError

PACKAGES = ("torch", "timm", "numpy", "pillow", "safetensors")
WIDTH = 115  # characters of a line of JSON
_ENCODE = json.JSONEncoder(allow_nan=False).encode


def write_json(path: Path | str, value: dict[str, Any]) -> None:
    """Write JSON atomically, as `json_text` lays it out. Raises ValueError: NaN or Infinity."""
    with atomic(path) as temporary:
        temporary.write_text(json_text(value) + "\n", encoding="utf-8")


def json_text(value: Any, depth: int = 0, before: int = 0) -> str:
    """JSON with lines filled up to WIDTH: a list or object that fits stays on one. Keys keep their order.

    depth: levels above, a space of indentation each; before: characters left of the value on its line.
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
    """The same JSON-able value with so many significant digits in every float."""
    if isinstance(value, dict):
        return {key: rounded(item, digits) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [rounded(item, digits) for item in value]
    return float(f"{value:.{digits}g}") if isinstance(value, float) else value


def read_json(path: Path | str, schema: str | None = None) -> dict[str, Any]:
    """Read a JSON artefact; with `schema`, its `schema` field must be that.

    Raises UserError: missing, not JSON, another schema.
    """
    path = Path(path)
    try:
        value = json.loads(path.read_text(encoding="utf-8"), parse_constant=_no_number)
    except FileNotFoundError:
        raise UserError(
            f"{path}: no such file; run the stage that makes it (`dvc repro`)"
        ) from None
    except (ValueError, OSError, RecursionError) as error:
        raise UserError(
            f"{path}: not readable as JSON ({error}); remove it and run its stage again"
        ) from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, got {type(value).__name__}")
    if schema is not None and value.get("schema") != schema:
        raise UserError(
            f"{path}: schema is {value.get('schema')!r}, expected {schema!r}; run its stage again"
        )
    return value


def _no_number(name: str) -> None:
    """Raise ValueError: NaN and Infinity are Python's, not JSON's, and `write_json` never writes them."""
    raise ValueError(f"{name} is no JSON number")


def expect(value: Any, path: Path | str, remedy: str, **kinds: type | UnionType) -> None:
    """Raise UserError where a JSON object lacks one of these keys, or holds another kind of value there."""
    for key, kind in kinds.items():
        got = value.get(key) if isinstance(value, dict) else value
        if not isinstance(got, kind) or (isinstance(got, bool) and kind is not bool):
            raise UserError(f"{path}: damaged, {key} is {reprlib.repr(got)}; {remedy}")


def sha256(path: Path | str) -> str:
    """Hex SHA-256 of a file's bytes."""
    with Path(path).open("rb") as f:
        return _hash_stream(f)


def _hash_stream(f: BinaryIO) -> str:
    state = hashlib.sha256()
    while block := f.read(1 << 20):
        state.update(block)
    return state.hexdigest()


def digest(value: Any) -> str:
    """Hex SHA-256 of a JSON-able value, independent of key order: the fingerprint of parameters and inputs."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def code(rooms: Iterable[str]) -> str:
    """Hex SHA-256 over the source of these rooms of pipeline/: unfinished work of other code is not resumed.

    A room is a folder or a file there: `training`, `teach.py`.
    """
    library = Path(__file__).parents[1]
    files = [path for room in rooms for path in _sources(library / room)]
    return digest({path.relative_to(library).as_posix(): sha256(path) for path in files})


def _sources(room: Path) -> list[Path]:
    return [room] if room.is_file() else sorted(room.rglob("*.py"))


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str | None]:
    """Installed versions by distribution name, None where absent; nothing is imported."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def provenance(params: Any = None, **inputs: Path | str) -> dict[str, Any]:
    """What made an artefact: parameters, the hash of each input file, package versions. Holds no clock time,

    so the same inputs give the same bytes.
    """
    return {
        "params": params,
        "inputs": {name: sha256(path) for name, path in inputs.items()},
        "versions": versions(),
    }
