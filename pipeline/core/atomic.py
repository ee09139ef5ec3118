"""Files that are whole or absent: a temporary sibling, fsync, rename; remains of killed runs are removed."""

from __future__ import annotations

import errno
import glob
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from pipeline.core.errors import UserError

try:
    import fcntl
except ImportError:  # no locks on this system: what a killed run left stays
    fcntl = None  # type: ignore[assignment]

PARTIAL = ".partial"  # the end of every unfinished name; git and DVC ignore it


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
    _check_foreign(folder, path)
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


def _check_foreign(folder: Path, path: Path) -> None:
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
