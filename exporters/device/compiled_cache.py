"""What a runtime made of a model on this device, kept in a folder beside a JSON that says who made it."""

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


def read_cached(path: Path, maker: dict[str, Any]) -> bytes | None:
    """The file's bytes where this maker made them and they are whole, else None."""
    try:
        noted = json.loads(sidecar_path(path).read_text(encoding="utf-8"))
        data = path.read_bytes()
    except (OSError, ValueError):
        return None
    return data if noted == {**maker, "sha256": hashlib.sha256(data).hexdigest()} else None


def write_cached(path: Path, data: bytes, maker: dict[str, Any]) -> None:
    """Write the file and its JSON, each whole or not at all; where that fails, say so and go on without."""
    noted = {**maker, "sha256": hashlib.sha256(data).hexdigest()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for target, content in (
            (path, data),
            (sidecar_path(path), json.dumps(noted, indent=1).encode() + b"\n"),
        ):
            _replace(target, content)
    except OSError as error:
        print(
            f"{path.name} is not kept, {path.parent}: {error.strerror}; give a writable --cache",
            file=sys.stderr,
        )


def _replace(target: Path, content: bytes) -> None:
    fd, name = tempfile.mkstemp(dir=str(target.parent), prefix=f".{target.name}.")
    try:
        with os.fdopen(fd, "wb") as file:
            file.write(content)
        Path(name).replace(target)
    finally:
        Path(name).unlink(missing_ok=True)
