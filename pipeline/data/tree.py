"""Every file below a folder, once, with the reason where it is not the user's data. Torch-free."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pipeline.core.errors import UserError

HIDDEN, SYSTEM = "hidden", "of an operating system"
LOOP, SPECIAL = "a link to a folder above itself", "no regular file"
SYSTEM_NAMES = {
    *("__macosx", "@eadir", "@tmp", "#recycle", "#snapshot", "$recycle.bin", "lost+found"),
    *("system volume information", "__pycache__"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"),
}


@dataclass(frozen=True)
class File:
    """A file by its path below the root, with `/`. `reason`: why it is not read, None where it may be."""

    name: str
    reason: str | None = None
    dead: bool = False  # a link to something that is not there


def walk(root: Path) -> Iterator[File]:
    """Yield every file below `root`, links to folders followed, in no order that matters.

    What lies in a hidden folder or one of an operating system has that reason too. Raises UserError: a folder
    that cannot be listed.
    """
    todo: list[tuple[str, str, str | None, frozenset[tuple[int, int]]]]
    todo = [(str(root), "", None, frozenset(map(_identity, [root, *root.resolve().parents])))]
    while todo:
        folder, prefix, inherited, above = todo.pop()
        try:
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(
                f"{folder}: cannot be listed ({error.strerror}); expected a folder that can be read; change its "
                "permissions or remove it"
            ) from None
        for entry in entries:
            name = prefix + entry.name
            reason = inherited or _reason(entry.name)
            # An entry knows what it is without a call to the file system; a link in a loop makes it raise.
            target = Path(entry.path) if entry.is_symlink() else entry
            if not target.is_dir():
                dead = isinstance(target, Path) and not target.exists()
                yield File(name, reason or (None if dead or target.is_file() else SPECIAL), dead)
            elif (identity := _identity(target)) in above:
                yield File(name, reason or LOOP)
            else:
                todo.append((entry.path, f"{name}/", reason, above | {identity}))


def folders(folder: Path) -> list[str]:
    """Names of the folders directly in `folder`, without hidden and system folders and links to a folder above."""
    above = {_identity(p) for p in (folder, *folder.absolute().parents, *folder.resolve().parents)}
    return sorted(
        p.name
        for p in folder.iterdir()
        if p.is_dir() and not _reason(p.name) and not (p.is_symlink() and _identity(p) in above)
    )


def _reason(name: str) -> str | None:
    if name.casefold() in SYSTEM_NAMES:
        return SYSTEM
    return HIDDEN if name[0] == "." else None


def _identity(folder: Path | os.DirEntry[str]) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino
