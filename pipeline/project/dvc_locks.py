"""Move the half-written files of a killed DVC aside: `python -m pipeline.project.dvc_locks`.

DVC writes two files in place and fails to start on half of one: `.dvc/tmp/rwlock`, which stage reads and writes
what (treeverse/dvc#7615), and `dvc.lock`, the hashes of every stage. Without a dvc.lock DVC restores most stages
from its run cache, trainings included, and runs the others again.
"""

from __future__ import annotations

import argparse
import fcntl
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dvc.exceptions import DvcException
from dvc.schema import COMPILED_LOCKFILE_SCHEMA
from dvc.utils import strictyaml

from pipeline.core import cli

TMP = Path(".dvc") / "tmp"
LOCKS = ("lock", "rwlock.lock")  # files in TMP that a dvc locks while it writes
CONFLICT = b"<<<<<<< "  # a merge conflict of git, which the user resolves


def set_aside(repository: Path) -> list[str]:
    """Move each half-written file to `.dvc/tmp/*.torn` and return their names; none while another dvc writes."""
    tmp = repository / TMP
    checks = ((tmp / "rwlock", _is_json), (repository / "dvc.lock", _is_lock))
    with _locked(tmp) as locked:
        existing = [(path, is_whole) for path, is_whole in checks if locked and path.is_file()]
        torn = [path for path, is_whole in existing if not is_whole(path)]
        for path in torn:
            path.replace(tmp / f"{path.name}.torn")
    return [path.name for path in torn]


@contextmanager
def _locked(tmp: Path) -> Iterator[bool]:
    """Lock the files that DVC locks; False where another process has them, or DVC has never run."""
    with ExitStack() as locks:
        try:
            for name in LOCKS:
                file = locks.enter_context((tmp / name).open("a"))
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
        else:
            yield True


def _is_json(path: Path) -> bool:
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def _is_lock(path: Path) -> bool:
    try:
        strictyaml.load(str(path), COMPILED_LOCKFILE_SCHEMA)
    except DvcException:
        return CONFLICT in path.read_bytes()
    return True


def main(_: argparse.Namespace) -> None:
    """Print what was moved aside."""
    for name in set_aside(Path()):
        print(f"{name}: half-written by a killed dvc; moved to {TMP / name}.torn")


if __name__ == "__main__":
    cli.run(main, argparse.ArgumentParser(prog="pipeline.project.dvc_locks", description=__doc__))
