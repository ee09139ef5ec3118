"""What may happen to a running stage: killed, its worker killed, two at once, a clock that jumps, a full disk."""

from __future__ import annotations

import ctypes
import os
import random
import resource
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from pipeline.core.atomic import PARTIAL
from tests import chain
from tests.chain import Stage

# For a process whose files may not grow: coverage's own would be cut short, too.
UNCOUNTED = {k: v for k, v in os.environ.items() if not k.startswith("COVERAGE")}
LEAST = 4096  # bytes of the smallest disk and of the smallest file limit
NEW_NAMES = 0x00020000 | 0x10000000  # CLONE_NEWNS | CLONE_NEWUSER
FUTURE, PAST = 4_000_000_000, 400_000_000  # seconds since 1970: the years 2096 and 1982


@dataclass(frozen=True)
class Scene:
    """One stage about to run in a folder; `seconds` it takes undisturbed."""

    stage: Stage
    folder: Path
    log: Path
    seconds: float
    draw: random.Random

    def start(self, first: Callable[[], None] = lambda: None) -> int:
        return chain.fork(self.stage, self.folder, self.log, first)

    def moment(self) -> float:
        """Sleep up to the time the stage takes; how long it was."""
        return slept(self.draw.uniform(0, self.seconds))


def slept(seconds: float) -> float:
    time.sleep(seconds)
    return seconds


def killed(scene: Scene) -> tuple[int, float]:
    """The stage and all it started, as the machine's memory killer or its power switch would."""
    child = scene.start()
    after = scene.moment()
    os.kill(child, signal.SIGKILL)
    return chain.wait(child), after


def worker_killed(scene: Scene) -> tuple[int, float]:
    """A process that the stage started: a DataLoader's, or one that a bench measures in."""
    began = time.monotonic()
    child = scene.start()
    kill_worker(psutil.Process(child), scene.draw.uniform(0, scene.seconds / 2))
    return chain.wait(child), time.monotonic() - began


def kill_worker(stage: psutil.Process, patience: float) -> bool:
    """Wait until `stage` has a child, then `patience` seconds, then kill one; False where it ended before."""
    until = None
    while stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE:
        workers = stage.children()
        if workers and until is None:
            until = time.monotonic() + patience
        if workers and until is not None and time.monotonic() >= until:
            workers[-1].kill()
            return True
        time.sleep(0.005)
    return False


def twice(scene: Scene) -> tuple[int, float]:
    """A second process of the stage on the same folder: of a killed dvc one may be left when the next begins."""
    first = scene.start()
    after = scene.moment()
    codes = chain.wait(scene.start()), chain.wait(first)
    return max(codes), after


def clock_jumped(scene: Scene) -> tuple[int, float]:
    """Killed; then every file has a time of decades ahead or behind."""
    ended = killed(scene)
    set_clocks(scene.folder, scene.draw.choice((FUTURE, PAST)))
    return ended


def set_clocks(folder: Path, seconds: float) -> None:
    for name in ("data", "artifacts", "reports", ".work"):
        for path in (folder / name).rglob("*"):
            os.utime(path, (seconds, seconds))


def limited(scene: Scene) -> tuple[int, float]:
    """No file may grow beyond a limit, as on a FAT disk or under `ulimit -f`."""
    limit = scene.draw.randint(LEAST, max(LEAST, largest(scene)))
    child = scene.start(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit)))
    return chain.wait(child), 0.0


def largest(scene: Scene) -> int:
    """Bytes of the largest file that the stage left beside the folder when it was not disturbed."""
    left = [p for o in scene.stage.outs for p in whole(scene.folder.parent / "undisturbed" / o)]
    return max(p.stat().st_size for p in left)


def whole(path: Path) -> list[Path]:
    return [p for p in path.rglob("*") if p.is_file()] if path.is_dir() else [path]


def filled(scene: Scene) -> tuple[int, float]:
    """Outs and work folder on a disk too small for both; what the work folder held is then carried over."""
    size = scene.draw.randint(LEAST, max(LEAST, 2 * largest(scene)))
    (scene.folder / "full").mkdir(exist_ok=True)
    child = os.fork()
    if child:
        code = chain.wait(child)
        (scene.folder / "full").rmdir()
        return code, 0.0
    code = 1
    try:
        mount(scene.folder / "full", size)
        code = chain.wait(chain.fork(scene.stage.moved("full"), scene.folder, scene.log))
        half = [str(p) for p in (scene.folder / "full").rglob(f"*{PARTIAL}")]
        if half:
            scene.log.open("a").write(f"Traceback of none: left half-written: {half}\n")
        kept = scene.folder / "full" / ".work"
        if kept.exists():
            shutil.copytree(kept, scene.folder / ".work", dirs_exist_ok=True)
    finally:
        os._exit(code)


def mount(place: Path, size: int) -> None:
    """A disk of `size` bytes at `place`, for this process and its children. Raises OSError: not permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    user, group = os.getuid(), os.getgid()
    if libc.unshare(NEW_NAMES):
        raise OSError(ctypes.get_errno(), "unshare")
    for name, text in (
        ("setgroups", "deny"),
        ("uid_map", f"0 {user} 1"),
        ("gid_map", f"0 {group} 1"),
    ):
        Path("/proc/self", name).write_text(text)
    if libc.mount(b"tmpfs", str(place).encode(), b"tmpfs", 0, f"size={size}".encode()):
        raise OSError(ctypes.get_errno(), "mount")


def why_no_small_disk(place: Path) -> str | None:
    """Why none can be mounted here, None where one can."""
    child = os.fork()
    if not child:
        code = 1
        try:
            mount(place, LEAST)
            code = 0
        except OSError as error:
            code = error.errno or 1
        finally:
            os._exit(code)
    code = chain.wait(child)
    return f"no small file system can be mounted here: {os.strerror(code)}" if code else None


ACCIDENTS = {
    "killed": killed,
    "worker killed": worker_killed,
    "twice at once": twice,
    "clock jumped": clock_jumped,
    "file limit": limited,
    "disk full": filled,
}
