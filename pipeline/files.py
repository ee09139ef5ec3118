"""Files that are whole or absent: atomic writes, hashes, JSON artefacts that carry schema and provenance."""

from __future__ import annotations

import errno
import glob
import hashlib
import importlib.metadata
import json
import os
import reprlib
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO

from pipeline.errors import UserError

try:
    import fcntl
except ImportError:  # no locks on this system: what a killed run left stays
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # the end of every unfinished name; git and DVC ignore it
PACKAGES = ("torch", "timm", "numpy", "pillow", "safetensors")


@contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling; on success fsync it and rename it onto `path`, on failure remove it."""
    path = Path(path)
    make_parent(path)
    sweep(path)
    temporary, fd = _claimed(path, _open_file_beside)
    try:
        yield temporary
        temporary.chmod(0o644)
        with temporary.open("rb+") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(fd)


@contextmanager
def atomic_dir(path: Path | str) -> Iterator[Path]:
    """Yield a temporary sibling folder; on success it takes the place of `path`, which is never half-written."""
    path = Path(path)
    make_parent(path)
    sweep(path)
    temporary, fd = _claimed(path, _open_folder_beside)
    try:
        yield temporary
        temporary.chmod(0o755)
        publish(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
        os.close(fd)


def sweep(path: Path) -> None:
    """Remove what killed runs left half-written beside `path`; what a live process holds stays."""
    for litter in path.parent.glob(f".{glob.escape(path.name)}.*{PARTIAL}"):
        try:
            fd = os.open(litter, os.O_RDONLY)
        except OSError:
            continue
        try:
            _lock(fd)
            if litter.is_dir():
                shutil.rmtree(litter, ignore_errors=True)
            else:
                litter.unlink(missing_ok=True)
        except OSError:
            continue
        finally:
            os.close(fd)


def _lock(fd: int) -> None:
    """Hold an open file or folder while `fd` is open. Raises OSError: another process holds it."""
    if fcntl is not None:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _claimed(path: Path, beside: Callable[[Path], tuple[Path, int]]) -> tuple[Path, int]:
    """A new temporary sibling and the descriptor that holds it; again where another run's sweep was faster."""
    while True:
        temporary, fd = beside(path)
        with suppress(BlockingIOError):
            _lock(fd)
            if temporary.exists():
                return temporary, fd
        os.close(fd)


def _open_file_beside(path: Path) -> tuple[Path, int]:
    fd, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL)
    return Path(name), fd


def _open_folder_beside(path: Path) -> tuple[Path, int]:
    while True:
        folder = _folder_beside(path)
        with suppress(FileNotFoundError):  # swept already
            return folder, os.open(folder, os.O_RDONLY)


def _folder_beside(path: Path) -> Path:
    return Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.", suffix=PARTIAL))


def publish(folder: Path, path: Path) -> None:
    """Rename a finished `folder` onto `path`. What stood there goes aside first: for a moment `path` is absent.

    Killed in that moment, a run leaves the old folder beside `path`; the next one sweeps it away. Of two runs that
    publish at once the later one's folder stays.
    Raises UserError: a file stands there, or a folder that holds nothing of what `folder` does.
    """
    make_parent(path)
    _refuse_foreign(folder, path)
    sweep(path)
    if folder.stat().st_dev != path.parent.stat().st_dev:
        with atomic_dir(path) as near:
            shutil.copytree(folder, near, dirs_exist_ok=True)
        shutil.rmtree(folder)
        return
    aside: list[Path] = []
    while not _took_the_place(folder, path):
        aside.append(_folder_beside(path))
        with suppress(FileNotFoundError):  # another run has moved it first
            path.replace(aside[-1] / "was")
    for old in aside:
        shutil.rmtree(old, ignore_errors=True)


def _took_the_place(folder: Path, path: Path) -> bool:
    """Rename `folder` to `path`, False where something stands there."""
    try:
        folder.replace(path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
            raise
        return False
    return True


def _refuse_foreign(folder: Path, path: Path) -> None:
    """Raise UserError where `path` is somebody's own: an output takes the place of an older one only."""
    there: set[str] = set()
    try:
        there = {p.name for p in path.iterdir()}
    except FileNotFoundError:  # nothing there, or another run's and gone already
        pass
    except NotADirectoryError:
        raise UserError(f"{path}: is a file; give a new folder") from None
    if there and not there & {p.name for p in folder.iterdir()}:
        raise UserError(
            f"{path}: holds {min(there)}, which this command did not write; give a new folder"
        )


def make_parent(path: Path) -> None:
    """Create the folder that `path` will stand in. Raises UserError: impossible, or not writable."""
    if path.name in ("", ".."):
        raise UserError(f"{path}: is no place for an output; give a new name in it")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"{path}: cannot create its folder ({error.strerror}); choose a writable path"
        ) from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"{path}: the folder {path.parent} is not writable; choose a writable path")


def write_json(path: Path | str, value: dict[str, Any]) -> None:
    """Write JSON atomically; keys keep their order, NaN is refused."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, allow_nan=False) + "\n", encoding="utf-8")


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


def code() -> str:
    """Hex SHA-256 over the library's source: unfinished work of other code is not gone on with."""
    root = Path(__file__).parent
    return digest({str(path.relative_to(root)): sha256(path) for path in root.rglob("*.py")})


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
