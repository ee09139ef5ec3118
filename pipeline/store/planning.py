"""What a store will cost here, and after how many epochs it has paid: bytes, disk and teacher, measured."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core.atomic import PARTIAL, make_parent
from pipeline.data import views
from pipeline.data.prepared import Prepared
from pipeline.models import teacher
from pipeline.store import encoding, shards
from pipeline.store.policy import Cache, check_layout
from pipeline.store.reading import THREADS

BLOCK = 8 << 20  # bytes written at once
SECONDS = 4.0  # for each of: writing, reading, the teacher, the replay
MAX_TEST_FILE = 2 << 30  # bytes of the file that tries the disk
SHARE_OF_FREE = 0.05


def plan(
    cache: Cache,
    prepared: Prepared,
    live: teacher.Teacher,
    folder: Path,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """What a store of this policy costs on this machine, and when it has paid.

    Raises UserError: the disk is short, a block that cannot be replayed.
    """
    check_layout(cache, live.spec)
    fields = shards.layout_fields(cache.layout, cache.dtype, live.spec, len(prepared.classes))
    per_view, images = shards.record_bytes(fields), len(prepared.rows("train"))
    free = shards.check_disk_space(folder, per_view * cache.views * images)
    write, read = disk_speed(folder, per_view, free, seconds)
    looked, replayed = teacher_speed(cache, prepared, live, seconds)
    return {
        "dtype": cache.dtype,
        "layout": cache.layout,
        "images": images,
        "views": cache.views,
        "bytes_per_view": per_view,
        "total_gb": per_view * cache.views * images / 1e9,
        "free_gb": free / 1e9,
        "disk_write_mb_per_s": write,
        "disk_read_mb_per_s": read,
        "teacher_img_per_s": looked,
        "replay_img_per_s": replayed,
        "needed_gb_per_s": per_view * looked / 1e9,
        **pay_back(cache.views, images, per_view, write, read, looked, replayed),
    }


def pay_back(
    n_views: int,
    images: int,
    per_view: int,
    write: float,
    read: float,
    looked: float,
    replayed: float,
) -> dict[str, float | None]:
    """Hours to write, and epochs (over all students that use the store) until the teacher's time is won back.

    Online a view costs 1/`looked` seconds, cached the longer of 1/`replayed` and its reading; writing it costs
    once the longer of 1/`looked` and its way to the disk. Speeds in images and in MB a second. None: never.
    """
    once = max(1 / looked, per_view / (write * 1e6))
    cached = max(1 / replayed, per_view / (read * 1e6)) if replayed else per_view / (read * 1e6)
    saved = 1 / looked - cached
    return {
        "hours_to_write": once * n_views * images / 3600,
        "pays_after_epochs": once * n_views / saved if saved > 0 else None,
    }


def disk_speed(folder: Path, per_view: int, free: int, seconds: float) -> tuple[float, float]:
    """MB/s where `folder` is to stand: written in a row and synced; records read at random, not from memory.

    Raises UserError: not writable.
    """
    make_parent(folder)
    block = os.urandom(BLOCK)
    largest = max(BLOCK, min(MAX_TEST_FILE, int(free * SHARE_OF_FREE)))
    with tempfile.NamedTemporaryFile(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL, buffering=0
    ) as file:
        start, size = time.perf_counter(), 0
        while size < largest and (size == 0 or time.perf_counter() - start < seconds):
            size += file.write(block)
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - start) / 1e6
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return write, _read_speed(file.fileno(), size, min(per_view, size), seconds)


def _read_speed(fd: int, size: int, record: int, seconds: float) -> float:
    """MB/s of records in random order, each at most once, as training reads them."""
    order = np.random.default_rng(0).permutation(size // record)
    until = time.perf_counter() + seconds

    def some(numbers: NDArray[np.int64]) -> int:
        into, done = memoryview(bytearray(record)), 0
        for number in numbers:
            done += os.preadv(fd, [into], int(number) * record)
            if time.perf_counter() > until:
                break
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(some, np.array_split(order, THREADS)))
    return total / (time.perf_counter() - start) / 1e6


def teacher_speed(
    cache: Cache, prepared: Prepared, live: teacher.Teacher, seconds: float
) -> tuple[float, float]:
    """Images a second of the teacher and of its replay (0: nothing is replayed), in batches of `cache.batch`."""
    train = prepared.rows("train")
    rows = np.resize(train, cache.batch)
    batch = views.view_batch(
        prepared.images, cache.geometry, cache.seed, rows, np.zeros_like(rows), train
    )
    x, _ = live.look(batch)
    looked = _rate(lambda: live.look(batch), len(batch), seconds)
    if cache.layout == "qkvh":
        return looked, 0.0
    stored, scale = encoding.encode(x, cache.dtype)
    return looked, _rate(lambda: live.tail(encoding.decode(stored, scale)), len(batch), seconds)


def _rate(once: Callable[[], object], images: int, seconds: float) -> float:
    """Images a second: the median of at least three calls after one to warm up."""
    once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return images / statistics.median(times)
