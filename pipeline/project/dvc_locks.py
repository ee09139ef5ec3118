"""`python -m pipeline.project.dvc_locks`: set aside the half-written files of a killed DVC, which it would refuse.

DVC writes two files in place: `.dvc/tmp/rwlock`, which stage reads and writes what (treeverse/dvc#7615), and
`dvc.lock`, the hashes of every stage. Without a dvc.lock DVC restores most stages from its run cache,
the trainings included, and runs the others again.
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
HELD = ("lock", "rwlock.lock")  # by a dvc while it writes; in TMP
CONFLICT = b"<<<<<<< "  # git's mark: it is for the user to resolve


def set_aside(repository: Path) -> list[str]:
    """Move each torn file to `.dvc/tmp/*.torn`; their names. Nothing while another dvc is writing."""
    tmp = repository / TMP
    judged = ((tmp / "rwlock", _is_json), (repository / "dvc.lock", _is_lock))
    with _alone(tmp) as alone:
        torn = [path for path, whole in judged if alone and path.is_file() and not whole(path)]
        for path in torn:
            path.replace(tmp / f"{path.name}.torn")
    return [path.name for path in torn]


@contextmanager
def _alone(tmp: Path) -> Iterator[bool]:
    """Hold what DVC holds; False where another process does, or where DVC has never run."""
    with ExitStack() as held:
        try:
            for name in HELD:
                file = held.enter_context((tmp / name).open("a"))
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
    """Tell what was set aside."""
    for name in set_aside(Path()):
        print(f"{name}: half-written by a killed dvc; set aside as {TMP / name}.torn")


if __name__ == "__main__":
    cli.run(main, argparse.ArgumentParser(prog="pipeline.project.dvc_locks", description=__doc__))
