"""The cost of a feature cache on this machine, and after how many epochs it pays off."""

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
SECONDS = 4.0  # per measurement: writing, reading, the teacher, the replay
# Bounds of the file that measures the disk, so that it does not fill a nearly full one.
MAX_TEST_FILE = 2 << 30  # bytes
SHARE_OF_FREE = 0.05


def plan(
    cache: Cache,
    prepared: Prepared,
    live: teacher.Teacher,
    folder: Path,
    seconds: float = SECONDS,
) -> dict[str, Any]:
    """Measure what a store of this policy costs on this machine; keys carry their units.

    Raises UserError: not enough disk space, a layout that does not fit the teacher.
    """
    check_layout(cache, live.spec)
    fields = shards.layout_fields(cache.layout, cache.dtype, live.spec, len(prepared.classes))
    per_view, images = shards.record_bytes(fields), len(prepared.rows("train"))
    free = shards.check_disk_space(folder, per_view * cache.views * images)
    write, read = disk_speed(folder, per_view, free, seconds)
    teacher_rate, replay_rate = teacher_speed(cache, prepared, live, seconds)
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
        "teacher_img_per_s": teacher_rate,
        "replay_img_per_s": replay_rate,
        "needed_gb_per_s": per_view * teacher_rate / 1e9,
        **pay_back(cache.views, images, per_view, write, read, teacher_rate, replay_rate),
    }


def pay_back(
    n_views: int,
    images: int,
    per_view: int,
    write: float,
    read: float,
    teacher_rate: float,
    replay_rate: float,
) -> dict[str, float | None]:
    """Compute the hours to write a store, and the epochs over all students after which it has saved that time.

    A view costs 1/`teacher_rate` seconds with the teacher running, the longer of 1/`replay_rate` and its reading
    with the store, and once the longer of 1/`teacher_rate` and its writing. Rates in images a second, `write` and
    `read` in MB a second. None: it never pays off.
    """
    once = max(1 / teacher_rate, per_view / (write * 1e6))
    reading = per_view / (read * 1e6)
    cached = max(1 / replay_rate, reading) if replay_rate else reading
    saved = 1 / teacher_rate - cached
    return {
        "hours_to_write": once * n_views * images / 3600,
        "pays_after_epochs": once * n_views / saved if saved > 0 else None,
    }


def disk_speed(folder: Path, per_view: int, free: int, seconds: float) -> tuple[float, float]:
    """Measure the disk of `folder` in MB/s: sequential synced write, random read of records.

    Raises UserError: not writable.
    """
    make_parent(folder)
    block = os.urandom(BLOCK)
    limit = max(BLOCK, min(MAX_TEST_FILE, int(free * SHARE_OF_FREE)))
    with tempfile.NamedTemporaryFile(
        dir=folder.parent, prefix=f".{folder.name}.", suffix=PARTIAL, buffering=0
    ) as file:
        start, size = time.perf_counter(), 0
        while size < limit and (size == 0 or time.perf_counter() - start < seconds):
            size += file.write(block)
        os.fsync(file.fileno())
        write = size / (time.perf_counter() - start) / 1e6
        if hasattr(os, "posix_fadvise"):  # drop the page cache, or the reads would measure memory
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return write, _read_speed(file.fileno(), size, min(per_view, size), seconds)


def _read_speed(fd: int, size: int, record: int, seconds: float) -> float:
    """Measure MB/s of records in random order, each at most once, as training reads them."""
    order = np.random.default_rng(0).permutation(size // record)
    until = time.perf_counter() + seconds

    def read(numbers: NDArray[np.int64]) -> int:
        buffer, done = memoryview(bytearray(record)), 0
        for number in numbers:
            done += os.preadv(fd, [buffer], int(number) * record)
            if time.perf_counter() > until:
                break
        return done

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        total = sum(pool.map(read, np.array_split(order, THREADS)))
    return total / (time.perf_counter() - start) / 1e6


def teacher_speed(
    cache: Cache, prepared: Prepared, live: teacher.Teacher, seconds: float
) -> tuple[float, float]:
    """Measure images a second of the teacher and of its replay (0 without one), in batches of `cache.batch`."""
    train = prepared.rows("train")
    rows = np.resize(train, cache.batch)
    batch = views.view_batch(
        prepared.images, cache.geometry, cache.seed, rows, np.zeros_like(rows), train
    )
    x, _ = live.look(batch)
    teacher_rate = _rate(lambda: live.look(batch), len(batch), seconds)
    if cache.layout != "block_input":
        return teacher_rate, 0.0
    stored, scale = encoding.encode(x, cache.dtype)
    return teacher_rate, _rate(
        lambda: live.tail(encoding.decode(stored, scale)), len(batch), seconds
    )


def _rate(once: Callable[[], object], images: int, seconds: float) -> float:
    """Measure images a second: the median of three calls or more, after one to warm up."""
    once()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = time.perf_counter()
        once()
        times.append(time.perf_counter() - start)
    return images / statistics.median(times)
