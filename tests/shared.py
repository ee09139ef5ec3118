"""Folders that are made once a run of the suite, by whichever of its worker processes needs one first."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock


class Shared:
    """The folders below `root`, which all workers of a run have in common."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: list[str] = []
        root.mkdir(exist_ok=True)

    def folder(self, name: str, make: Callable[[Path], object]) -> Path:
        """The folder that `make` filled; the others wait. What a dead worker left unfinished is made anew."""
        whole, finished = self.root / name, self.root / f"{name}.json"
        with FileLock(self.root / f"{name}.lock"):
            if not finished.exists():
                shutil.rmtree(whole, ignore_errors=True)
                whole.mkdir()
                make(whole)
                written = finished.with_suffix(".partial")
                written.write_text(json.dumps(files(whole)))
                written.rename(finished)
        self.used.append(name)
        return whole

    def refuse_changes(self) -> None:
        """Fail where a test wrote into a folder that others read."""
        for name in self.used:
            made = json.loads((self.root / f"{name}.json").read_text())
            assert files(self.root / name) == made, f"a test wrote into {name}: give it a copy"


def files(folder: Path) -> dict[str, list[int]]:
    """Size and time of last change of every file below a folder."""
    paths = [p for p in sorted(folder.rglob("*")) if p.is_file()]
    stats = {p.relative_to(folder).as_posix(): p.stat() for p in paths}
    return {name: [stat.st_size, stat.st_mtime_ns] for name, stat in stats.items()}
