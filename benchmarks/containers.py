"""The same records of ViT-B/16 through our shards, one file an image, HDF5, zarr and a Hugging Face data set.

A record is x_L of one view, (197, 768) float16. Each container gets the same random batches and gives each back as
one array in memory, by its library's fastest call that we know; ours reads on two threads and checks every
record's checksum.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.core import artifacts
from pipeline.core.errors import UserError
from pipeline.models.probe import Anatomy
from pipeline.store import shards
from pipeline.store.reading import Reader

SHAPE = (197, 768)
BATCH = 64
SHARD = 832  # records: 256 MB
PASSES = 3
Records = NDArray[np.float16]
Read = Callable[[NDArray[np.int64]], Any]


def blocks(count: int) -> Iterator[tuple[int, Records]]:
    """The records, a shard at a time: (first number, (n, 197, 768) float16)."""
    draw = np.random.default_rng(0)
    for first in range(0, count, SHARD):
        size = (min(SHARD, count - first), *SHAPE)
        yield first, draw.standard_normal(size, dtype=np.float32).astype(np.float16)


def ours(folder: Path, count: int) -> Callable[[], Read]:
    """Our shards and reader."""
    found = Anatomy(1, (14, 14), 12, SHAPE[1], {}, None)
    fields = shards.layout_fields("block_input", "float16", found, 1)
    entries = []
    for first, block in blocks(count):
        path = folder / f"{first:06d}.safetensors"
        n = len(block)
        tensors = {"x": torch.from_numpy(block), "logits": torch.zeros(n, 1)}
        tensors["view_hash"] = torch.zeros(n, dtype=torch.int64)
        shards.save(path, tensors, first)
        entries.append((path, {"records": n, "bytes": path.stat().st_size}, first))

    def opened() -> Read:
        reader = Reader([shards.Shard(p, fields, entry, first) for p, entry, first in entries])
        return lambda records: reader.finish(records)["x"]

    return opened


def one_file_an_image(folder: Path, count: int) -> Callable[[], Read]:
    """torch.save, one .pt a record."""
    for first, block in blocks(count):
        for n, record in enumerate(block):
            torch.save(torch.from_numpy(record), folder / f"{first + n:06d}.pt")

    def read(records: NDArray[np.int64]) -> Any:
        paths = [folder / f"{n:06d}.pt" for n in records]
        return torch.stack([torch.load(path, weights_only=True) for path in paths])

    return lambda: read


def hdf5(folder: Path, count: int) -> Callable[[], Read]:
    """h5py, one data set, a chunk a record, no compression."""
    import h5py

    with h5py.File(folder / "records.h5", "w") as file:
        made = file.create_dataset("x", (count, *SHAPE), np.float16, chunks=(1, *SHAPE))
        for first, block in blocks(count):
            made[first : first + len(block)] = block

    def opened() -> Read:
        stored = h5py.File(folder / "records.h5")["x"]
        return lambda records: np.stack([stored[n] for n in records])

    return opened


def zarr(folder: Path, count: int) -> Callable[[], Read]:
    """zarr 3, a chunk a record, no compression."""
    import zarr as library

    made = library.create_array(
        folder / "z", shape=(count, *SHAPE), chunks=(1, *SHAPE), dtype="float16", compressors=None
    )
    for first, block in blocks(count):
        made[first : first + len(block)] = block

    def opened() -> Read:
        stored = library.open_array(folder / "z", mode="r")
        return lambda records: np.stack([stored[n] for n in records])  # oindex is slower

    return opened


def hf_datasets(folder: Path, count: int) -> Callable[[], Read]:
    """Hugging Face datasets: Arrow files, Array2D, format arrow."""
    import datasets

    datasets.disable_progress_bars()
    features = datasets.Features({"x": datasets.Array2D(SHAPE, "float16")})

    def rows() -> Iterator[dict[str, Records]]:
        for _, block in blocks(count):
            for record in block:
                yield {"x": record}

    made = datasets.Dataset.from_generator(
        rows, features=features, cache_dir=str(folder / "cache"), writer_batch_size=100
    )
    made.save_to_disk(folder / "saved")

    def opened() -> Read:
        stored = datasets.load_from_disk(folder / "saved").with_format("arrow")

        def read(records: NDArray[np.int64]) -> Any:
            column = stored[records.tolist()]["x"].combine_chunks()
            flat = column.storage.flatten().flatten()  # ten times faster than the format numpy
            return np.asarray(flat).reshape(len(records), *SHAPE)

        return read

    return opened


CONTAINERS = {
    "this store": ours,
    "torch.save, one file an image": one_file_an_image,
    "HDF5 (h5py)": hdf5,
    "zarr": zarr,
    "HF datasets": hf_datasets,
}


def measure(count: int, work: Path | None) -> dict[str, Any]:
    """Write every container, then read each in turns. Raises UserError: a library is missing."""
    with tempfile.TemporaryDirectory(dir=work) as name:
        opens, sizes, seconds = {}, {}, {}
        for container, write in CONTAINERS.items():
            folder = Path(name) / write.__name__
            folder.mkdir()
            start = time.perf_counter()
            try:
                opens[container] = write(folder, count)
            except ImportError as error:
                raise UserError(f"{container}: {error}; `pip install '.[benchmarks]'`") from None
            os.sync()
            seconds[container] = time.perf_counter() - start
            sizes[container] = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
            if write is hf_datasets:  # it keeps the data twice: once as made, once as saved
                sizes[container] = sum(p.stat().st_size for p in (folder / "saved").iterdir())
        runs: dict[str, dict[str, list[dict[str, float]]]] = {c: {} for c in CONTAINERS}
        for number in range(PASSES):
            for container in CONTAINERS:
                folder = Path(name) / CONTAINERS[container].__name__
                forget(folder)
                for state in ("cold", "warm"):
                    found = one_pass(opens[container](), count, seed=number)
                    runs[container].setdefault(state, []).append(found)
    return {
        "records": count,
        "record_bytes": 2 * SHAPE[0] * SHAPE[1],
        "versions": versions(),
        "containers": {
            container: {
                "bytes_per_record": sizes[container] / count,
                "write_s": seconds[container],
                **{
                    s: {k: statistics.median(r[k] for r in rows) for k in rows[0]}
                    for s, rows in by.items()
                },
            }
            for container, by in runs.items()
        },
    }


def forget(folder: Path) -> None:
    """Take the folder's files out of the page cache, as far as the system lets a process."""
    os.sync()
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def one_pass(read: Read, count: int, seed: int) -> dict[str, float]:
    """Every record once, in random batches: CPU milliseconds a record over all threads, records a second."""
    order = np.random.default_rng(seed).permutation(count)
    cpu, wall = time.process_time(), time.perf_counter()
    for at in range(0, count, BATCH):
        batch = read(order[at : at + BATCH])
        assert batch.shape[1:] == SHAPE
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    return {"cpu_ms_per_record": 1e3 * cpu / count, "records_per_s": count / wall}


def table(found: dict[str, Any]) -> str:
    """The Markdown table; speeds as ratios to this store, whose own figures stand below."""
    mine = found["containers"]["this store"]
    lines = [
        "| container | bytes a view | CPU a record, warm | cold | records/s, warm | cold |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, row in found["containers"].items():
        cpu = [row[s]["cpu_ms_per_record"] / mine[s]["cpu_ms_per_record"] for s in ("warm", "cold")]
        rate = [row[s]["records_per_s"] / mine[s]["records_per_s"] for s in ("warm", "cold")]
        cells = [f"{v:.2f}×" for v in (*cpu, *rate)]
        lines.append(f"| {name} | {row['bytes_per_record']:,.0f} | {' | '.join(cells)} |")
    warm, cold = mine["warm"], mine["cold"]
    lines += [
        "",
        f"This store on this machine: {warm['cpu_ms_per_record']:.3f} ms of CPU a record and "
        f"{warm['records_per_s']:,.0f} records/s warm, {cold['cpu_ms_per_record']:.3f} ms and "
        f"{cold['records_per_s']:,.0f} records/s cold; {found['records']} records of "
        f"{found['record_bytes']:,} bytes, batches of {BATCH} at random, median of {PASSES} passes.",
        f"Versions: {', '.join(f'{k} {v}' for k, v in found['versions'].items())}.",
    ]
    return "\n".join(lines)


def versions() -> dict[str, str | None]:
    """Of the libraries that were compared."""
    return artifacts.versions(("safetensors", "torch", "h5py", "zarr", "datasets"))
