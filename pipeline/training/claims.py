"""Claims: work divided between processes that share a folder and may join, leave or be killed at any time.

A claim is a file that one process alone can create (O_EXCL: atomic on a local disk, and on NFS since version 3).
Its owner renews a file of its own; who has seen that unchanged for LEASE seconds, by its own clock, takes over the
claim by creating the next generation of it. flock alone would not do: over NFS it needs a lock service, without
which each machine locks for itself. Between processes of one machine it is used: it shows a killed owner at once.

An owner that was only suspended goes on beside its successor until it asks `holds`. So what a claim protects must
be written whole, and with the same bytes by everyone; then a lost claim costs time and nothing else.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import shutil
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pipeline.core import artifacts
from pipeline.core.atomic import PARTIAL, make_parent, sweep
from pipeline.core.errors import UserError

LEASE = 60.0  # seconds without a sign of life after which an owner counts as dead
BEATS = 6  # signs of life in one lease
PATIENCE = 10.0  # seconds a stopped predecessor with other settings gets to save and leave
POLL = 0.2
LEFT = b"left"  # instead of the machine's name: the owner has released all its claims
BOOT_ID = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine

State = Literal["alive", "dead", "unknown"]


class FolderGoneError(Exception):
    """The shared folder is not there any more: another process has finished the work, or somebody removed it."""


def this_machine() -> bytes:
    """Return what processes under the same kernel have in common; empty where that is not known."""
    try:
        return BOOT_ID.read_bytes().strip()
    except OSError:
        return b""


class Watch:
    """What this process has seen of the owners in a folder; the clocks of other machines play no part."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._seen: dict[str, tuple[bytes, float, bool]] = {}  # content, since when, has it changed

    def state(self, name: str) -> State:
        """Judge the owner by its file; one without a content counts as dead after LEASE seconds too."""
        content, now = _read(self.folder / name), time.monotonic()
        if content.startswith(LEFT):
            return "dead"
        before, since, changed = self._seen.get(name, (content, now, False))
        if before != content:
            since, changed = now, True
        self._seen[name] = content, since, changed
        machine = content.partition(b" ")[0]
        if machine and machine == this_machine():
            return "alive" if _is_locked(self.folder / name) else "dead"
        if now - since >= LEASE:
            return "dead"
        return "alive" if changed else "unknown"

    def owners(self) -> list[str]:
        """List the files of all owners that ever joined."""
        with suppress(FileNotFoundError):
            return [path.name for path in self.folder.glob("owner-*")]
        return []


def _read(path: Path) -> bytes:
    """Read a small file; opening it makes NFS ask the server. Empty where there is none."""
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _is_locked(path: Path) -> bool:
    """Whether a process of this machine holds the file."""
    try:
        with path.open("rb+") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


class Claims:
    """The claims of this process in a folder; a context manager, in which a thread renews them.

    Leaving it releases them all, with an error too. Raises FolderGoneError: there is no folder (any more).
    """

    def __init__(self, folder: Path) -> None:
        host = re.sub(r"[^\w.]", "-", socket.gethostname())
        self.folder = folder
        self.name = f"owner-{host}-{os.getpid()}-{secrets.token_hex(4)}"
        self.watch = Watch(folder)
        self._own: dict[str, int] = {}  # name of a claim -> generation
        self._beat, self._stop = 0, threading.Event()

    def __enter__(self) -> Claims:
        self._file = self._create(self.name)
        self._machine = this_machine()
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:  # a file system without locks: the lease alone counts
            self._machine = b""
        self._renew()
        self._thread = threading.Thread(target=self._renew_until_stopped, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        with suppress(OSError):
            os.pwrite(self._file, LEFT + b" ", 0)
            os.fsync(self._file)
        os.close(self._file)

    def _renew_until_stopped(self) -> None:
        while not self._stop.wait(LEASE / BEATS):
            with suppress(OSError):  # the next one may get through
                self._renew()

    def _renew(self) -> None:
        self._beat += 1
        os.pwrite(self._file, self._machine + b" %016d\n" % self._beat, 0)
        os.fsync(self._file)

    def _create(self, name: str) -> int:
        """Create a file that is not there. Raises FileExistsError: it is; FolderGoneError: there is no folder."""
        try:
            return os.open(self.folder / name, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        except FileNotFoundError:
            raise FolderGoneError(self.folder) from None

    def take(self, name: str, over_living: bool = False) -> bool:
        """Claim a piece of work; False where a living process has it, unless it is taken `over_living`.

        Of several processes that take over the claim of a dead one, one gets it.
        """
        generation = self._own.get(name, 0)
        with suppress(FileExistsError):
            if name not in self._own:
                return self._claim(name, 0)
        while (self.folder / f"{name}.{generation + 1}").exists():
            generation += 1
        if self._own.get(name) == generation:
            return True
        if not over_living and self._state(f"{name}.{generation}") != "dead":
            return False
        with suppress(FileExistsError):
            return self._claim(name, generation + 1)
        return False

    def _claim(self, name: str, generation: int) -> bool:
        file = self._create(f"{name}.{generation}")
        try:
            os.write(file, self.name.encode())
            os.fsync(file)
        finally:
            os.close(file)
        self._own[name] = generation
        return True

    def _state(self, claim: str) -> State:
        """Judge a claim's owner; a claim is empty where its owner died, or is, between creating and writing it."""
        owner = _read(self.folder / claim).decode(errors="replace")
        return self.watch.state(owner if owner.startswith("owner-") else claim)

    def holds(self, name: str) -> bool:
        """Whether the claim is still this process's: nobody took it over, and nobody finished the work."""
        generation = self._own[name]
        own, next_one = (self.folder / f"{name}.{g}" for g in (generation, generation + 1))
        return own.exists() and not next_one.exists()

    def in_company(self) -> bool:
        """Whether another process is at work here, or may be."""
        others = (name for name in self.watch.owners() if name != self.name)
        return any(self.watch.state(name) != "dead" for name in others)


@contextmanager
def shared_folder(root: Path, settings: Mapping[str, Any]) -> Iterator[tuple[Path, Claims]]:
    """Open the folder of an unfinished work, `root/<digest of settings>`, beside others with these settings.

    It stays until `dissolve`, so that the next process goes on with it.
    Raises UserError: a process with other settings is at work below `root`.
    """
    folder = folder_of(root, settings)
    make_parent(folder)
    while True:
        (folder / "claims").mkdir(parents=True, exist_ok=True)
        claims = Claims(folder / "claims")
        with suppress(FolderGoneError):  # dissolved since `mkdir`
            claims.__enter__()
            break
    try:
        if not (folder / "settings.json").exists():
            artifacts.write_json(folder / "settings.json", dict(settings))
        _wait_for_others(root, folder, settings)
        yield folder, claims
    finally:
        claims.__exit__()
        sweep(
            folder
        )  # NFS keeps a removed file's folder while a process of this machine has the file open


def folder_of(root: Path, settings: Mapping[str, Any]) -> Path:
    """Return the folder of the work with these settings."""
    return root / artifacts.digest(settings)[:16]


def dissolve(folder: Path) -> None:
    """Remove a finished work's folder, for other processes all at once: what they look for is gone."""
    doomed = folder.with_name(f".{folder.name}.{secrets.token_hex(4)}{PARTIAL}")
    with suppress(FileNotFoundError):
        folder.rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def _wait_for_others(root: Path, folder: Path, settings: Mapping[str, Any]) -> None:
    """Wait until no process with other settings is at work below `root`; who is alive gets PATIENCE seconds."""
    until = time.monotonic() + PATIENCE
    for other in sorted(root.iterdir()):
        if other == folder or other.name.startswith(".") or not (other / "claims").is_dir():
            continue
        watch = Watch(other / "claims")
        while living := {n: s for n in watch.owners() if (s := watch.state(n)) != "dead"}:
            alive = [name for name, state in living.items() if state == "alive"]
            if alive and time.monotonic() >= until:
                raise UserError(
                    f"{other}: in use by {alive[0].removeprefix('owner-')} with other settings "
                    f"({_difference(other, settings)}); expected the same for all processes of a work folder; "
                    "wait for it or stop it, then run again"
                )
            time.sleep(POLL)


def _difference(other: Path, settings: Mapping[str, Any]) -> str:
    """Describe the first setting that differs from those of another folder."""
    try:
        theirs = artifacts.read_json(other / "settings.json")
    except UserError:  # it has just begun, or is being removed
        return "unknown"
    for name, value in settings.items():
        if theirs.get(name) != value:
            return f"{name}: {str(theirs.get(name))[:20]} there, {str(value)[:20]} here"
    return "unknown"
