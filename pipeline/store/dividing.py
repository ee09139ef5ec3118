"""Division of a store's shards between processes that share a work folder, and publishing it once.

A process takes the next shard that is neither written nor claimed (`pipeline.training.claims`). When none is
missing, one process seals the manifest and publishes the store; the others wait for that.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from pipeline.core import artifacts, machine
from pipeline.core.atomic import publish
from pipeline.core.errors import UserError
from pipeline.store import shards, verifying
from pipeline.store.reading import SCHEMA, open_manifest
from pipeline.training import claims, resume
from pipeline.training.claims import Claims, FolderGoneError

POLL = 0.5  # seconds between two looks at the work of other processes
SEAL = "manifest"  # the claim of the process that publishes


class Work(Protocol):
    """What is to be written (`writing.Task`)."""

    fingerprint: dict[str, Any]
    fields: shards.Fields
    total: int

    @property
    def shard_count(self) -> int:
        """Number of shards."""

    def records_of(self, number: int) -> NDArray[np.int64]:
        """The records of a shard."""

    def make(
        self, number: int, progress: Callable[[int], None]
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """The content of a shard; `progress` gets the records done."""

    def save(
        self, folder: Path, number: int, tensors: dict[str, Tensor], errors: dict[str, float]
    ) -> None:
        """Write a shard, and then its note."""

    def entries(self, folder: Path) -> list[dict[str, Any]]:
        """The notes of all shards."""

    def manifest(self, folder: Path) -> dict[str, Any]:
        """The sealed manifest."""


def note_of(folder: Path, number: int) -> Path:
    """Return the path of a shard's note: its entry in the manifest, written when the shard is on the disk."""
    return folder / "notes" / f"shard-{number:05d}.json"


def shard_of(folder: Path, number: int) -> Path:
    """Return the path of a shard."""
    return folder / "store" / f"shard-{number:05d}.safetensors"


def write(
    task: Work, work: Path, settings: dict[str, Any], out: Path, progress: Callable[[int], None]
) -> None:
    """Write the store beside all processes with these settings; it is at `out` when any of them returns.

    `progress` is called with the records that all of them have written.
    Raises UserError: disk full, a process with other settings in the same work folder, the folder was removed.
    """
    receipt = claims.folder_of(work, settings).with_suffix(".receipt")
    if _is_published(receipt, out):  # by the others, before this process came
        return
    with (
        claims.shared_folder(work, settings) as (folder, own),
        resume.Interrupts() as interrupts,
        ThreadPoolExecutor(1) as disk,
    ):
        try:
            Writer(task, folder, own, progress, interrupts, disk).run(out, receipt)
        except FolderGoneError:
            _wait_for_publication(receipt, out, folder)
        except FileNotFoundError:  # published between two looks at the folder
            if folder.exists():
                raise
            _wait_for_publication(receipt, out, folder)


def _is_published(receipt: Path, out: Path, every_byte: bool = True) -> bool:
    """Whether `out` is what processes with these settings published last, undamaged."""
    if not (receipt.is_file() and (out / "manifest.json").is_file()):
        return False
    try:
        manifest = verifying.check_bytes(out) if every_byte else open_manifest(out)
    except UserError:
        return False
    return bool(manifest["sha256"] == artifacts.read_json(receipt)["manifest"])


def _wait_for_publication(receipt: Path, out: Path, folder: Path) -> None:
    """Wait until this machine sees what another has published: over NFS that may take a minute."""
    until = time.monotonic() + claims.LEASE
    while not _is_published(receipt, out, every_byte=False):
        if time.monotonic() > until:
            raise UserError(
                f"{folder}: removed while this process wrote into it; expected it to stay until {out} is "
                "published; run again"
            )
        time.sleep(POLL)


class _ClaimLostError(Exception):
    """Another process has taken over the shard that this one was writing."""


class Writer:
    """One process's part in writing a store: shard after shard, then the manifest, unless another is faster."""

    def __init__(
        self,
        task: Work,
        folder: Path,
        own: Claims,
        progress: Callable[[int], None],
        interrupts: resume.Interrupts,
        disk: ThreadPoolExecutor,
    ) -> None:
        self.task, self.folder, self.claims = task, folder, own
        self.progress, self.interrupts, self.disk = progress, interrupts, disk
        self.saving: tuple[int, Future[None]] | None = None
        self.reported = 0

    def run(self, out: Path, receipt: Path) -> None:
        """Write shards until none is missing, and publish. Raises FolderGoneError: another has published."""
        for name in ("store", "notes"):
            (self.folder / name).mkdir(exist_ok=True)
        lost = [n for n in self._noted() if not shard_of(self.folder, n).is_file()]
        if lost and self._was_published(out):
            self._finish(out, receipt)
            return
        for number in lost:
            note_of(self.folder, number).unlink(missing_ok=True)
        self._check_disk_space(out)
        unchecked = self._noted()  # written before this process came
        patience = 2 if unchecked else 0  # who has nothing to check seals
        while True:
            self.interrupts.leave_if_signalled(self.folder)
            missing = [n for n in range(self.task.shard_count) if n not in self._finished()]
            if any(self._write(n) for n in missing):
                continue
            self._finish_saving()
            patience -= not missing
            if (
                missing
                or (patience >= 0 and self.claims.in_company())
                or not self.claims.take(SEAL)
            ):
                self._report(self._records())
                time.sleep(POLL)
                continue
            damaged = self._damaged(unchecked)
            for number in damaged:
                note_of(self.folder, number).unlink(missing_ok=True)
                self._write(number, over_living=True)
            unchecked = set()
            if not damaged:
                self._publish(out)
                self._finish(out, receipt)
                return

    def _noted(self) -> set[int]:
        """List the shards on the disk: a shard has its note when it is whole."""
        try:
            names = [path.name for path in (self.folder / "notes").iterdir()]
        except FileNotFoundError:
            raise FolderGoneError(self.folder) from None
        return {int(name[6:11]) for name in names if name.startswith("shard-")}

    def _finished(self) -> set[int]:
        """List the shards that need no process any more, with the one that this process is saving."""
        return self._noted() | ({self.saving[0]} if self.saving else set())

    def _records(self) -> int:
        """Count the records of all finished shards."""
        return sum(len(self.task.records_of(n)) for n in self._finished())

    def _report(self, done: int) -> None:
        if done != self.reported:
            self.progress(done)
        self.reported = done

    def _write(self, number: int, over_living: bool = False) -> bool:
        """Write a shard, False where another process does; it is saved while the teacher runs on the next."""
        name = f"shard-{number:05d}"
        if not self.claims.take(name, over_living):
            return False
        if number in self._finished():  # finished since the last look
            return True
        before = self._records()

        def report(more: int) -> None:
            self._report(before + more)
            self.interrupts.leave_if_signalled(self.folder)
            if not self.claims.holds(name):
                raise _ClaimLostError

        try:
            tensors, errors = self.task.make(number, report)
        except _ClaimLostError:
            return True
        self._finish_saving()
        self.saving = number, self.disk.submit(self._save, number, tensors, errors)
        return True

    def _save(self, number: int, tensors: dict[str, Tensor], errors: dict[str, float]) -> None:
        name = f"shard-{number:05d}"
        if not self.claims.holds(name):
            return
        try:
            self.task.save(self.folder, number, tensors, errors)
        except UserError:
            if self.claims.holds(name):  # else its successor has swept away the unfinished file
                raise

    def _finish_saving(self) -> None:
        if self.saving is not None:
            self.saving[1].result()
            self.saving = None

    def _damaged(self, numbers: set[int]) -> list[int]:
        """List those of the shards whose bytes are not those of their note."""
        with ThreadPoolExecutor(machine.usable_cores()) as pool:
            checks = {n: pool.submit(_is_complete, self.folder, n) for n in sorted(numbers)}
            try:
                for check in checks.values():
                    check.result()
                    self.interrupts.leave_if_signalled(self.folder)
            finally:
                pool.shutdown(cancel_futures=True)
        return [n for n, check in checks.items() if not check.result()]

    def _check_disk_space(self, out: Path) -> None:
        written = 0
        for number in range(self.task.shard_count):
            with suppress(FileNotFoundError):
                written += shard_of(self.folder, number).stat().st_size
        total = self.task.total * shards.record_bytes(self.task.fields)
        shards.check_disk_space(self.folder, max(0, total - written))
        parent = shards.nearest_existing(out.absolute().parent)
        disks = {path.stat().st_dev for path in (self.folder, parent)}
        if len(disks) > 1:  # `publish` copies
            shards.check_disk_space(out, total)

    def _publish(self, out: Path) -> None:
        """Seal the manifest and publish. Raises FolderGoneError: a successor in the claim has been faster."""
        store = self.folder / "store"
        try:
            manifest = self.task.manifest(self.folder)
        except UserError:
            if self.claims.holds(SEAL):
                raise
            raise FolderGoneError(self.folder) from None
        if not self.claims.holds(SEAL):
            raise FolderGoneError(self.folder)
        artifacts.write_json(self.folder / "manifest.json", manifest)
        try:
            files = {entry["file"] for entry in manifest["shards"]}
            for path in store.iterdir():
                if path.name not in files:  # left by a killed process
                    path.unlink()
            if not files <= {path.name for path in store.iterdir()}:
                raise FolderGoneError(self.folder)
            # Replaced, not written there: that would make a new folder in place of a published one.
            (self.folder / "manifest.json").replace(store / "manifest.json")
            publish(store, out)
        except FileNotFoundError:
            raise FolderGoneError(self.folder) from None

    def _was_published(self, out: Path) -> bool:
        """Whether `out` has the noted shards: a process was killed after publishing them."""
        if len(self._noted()) < self.task.shard_count or not (out / "manifest.json").is_file():
            return False
        manifest = artifacts.read_json(out / "manifest.json", SCHEMA)
        entries = self.task.entries(self.folder)
        return (manifest["fingerprint"], manifest["shards"]) == (self.task.fingerprint, entries)

    def _finish(self, out: Path, receipt: Path) -> None:
        manifest = artifacts.read_json(out / "manifest.json", SCHEMA)
        artifacts.write_json(receipt, {"manifest": manifest["sha256"]})
        claims.dissolve(self.folder)


def _is_complete(folder: Path, number: int) -> bool:
    """Whether a shard has the bytes that its note was written for."""
    note, shard = note_of(folder, number), shard_of(folder, number)
    if not (note.is_file() and shard.is_file()):
        return False
    return bool(artifacts.read_json(note)["sha256"] == artifacts.sha256(shard))
