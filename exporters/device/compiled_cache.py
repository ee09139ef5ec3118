"""Cache of what a runtime compiled on this device: a file beside a JSON that says what it was compiled by."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any


def sidecar_path(path: Path) -> Path:
    """student.plan -> student.plan.json."""
    return path.with_name(f"{path.name}.json")


def read_cached(path: Path, key: dict[str, Any]) -> bytes | None:
    """The file's bytes where they are whole and were written under the same key, else None."""
    try:
        written = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    return data if written == {**key, "sha256": hashlib.sha256(data).hexdigest()} else None


def write_cached(path: Path, data: bytes, key: dict[str, Any]) -> None:
    """Write the file and its JSON, each atomically; a failure is one line on stderr, and the run goes on."""
    sidecar = json.dumps({**key, "sha256": hashlib.sha256(data).hexdigest()}, indent=1) + "\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _replace(path, data)
        _replace(sidecar_path(path), sidecar.encode())
    except OSError as error:
        message = f"{path.name} is not cached, {path.parent}: {error.strerror}"
        print(f"{message}; give a writable --cache", file=sys.stderr)


def _replace(target: Path, content: bytes) -> None:
    fd, name = tempfile.mkstemp(dir=str(target.parent), prefix=f".{target.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
