"""A prepared folder, opened: pixels, labels, splits, in an order that nothing but the pixels decides. Torch-free.

`images.npy` (N, S, S, 3) uint8 RGB; `index.json` with a record an image, in the order of the pixels' SHA-256, so
that the same pictures give the same bytes from whatever container they came; `source.json` says from which.
"""

from __future__ import annotations

import reprlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.core import artifacts
from pipeline.core.errors import UserError

SCHEMA = "cakd.prepared/2"
SOURCE_SCHEMA = "cakd.source/1"
SPLITS = ("train", "val", "test")
UNLABELLED = -1
MAX_SIDE = 4096  # pixels of a prepared image

REMEDY = "run prepare again (`dvc repro prepare`)"


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened. images (N, S, S, 3) uint8 memory-mapped; labels (N,) with -1 unlabelled."""

    folder: Path
    images: NDArray[np.uint8]
    sha256: tuple[str, ...]  # of each record's pixels
    labels: NDArray[np.int64]
    splits: NDArray[np.str_]
    student_label: NDArray[np.bool_]
    classes: tuple[str, ...]
    image_size: int
    images_sha256: str  # of the pixels
    index_sha256: str  # of the index: labels, splits, which labels the student may see

    @classmethod
    def open(cls, folder: Path | str) -> Prepared:
        """Open, and check the index and the shape of the pixels; `verify` hashes these.

        Raises UserError: missing, damaged.
        """
        folder = Path(folder)
        index = artifacts.read_json(folder / "index.json", SCHEMA)
        validate_index(index, folder / "index.json")
        records = index["records"]
        return cls(
            folder=folder,
            images=_pixels(folder / "images.npy", (len(records), *[index["image_size"]] * 2, 3)),
            sha256=tuple(r["sha256"] for r in records),
            labels=np.array([r["label"] for r in records], dtype=np.int64),
            splits=np.array([r["split"] for r in records]),
            student_label=np.array([r["student_label"] for r in records], dtype=bool),
            classes=tuple(index["classes"]),
            image_size=index["image_size"],
            images_sha256=index["images_sha256"],
            index_sha256=artifacts.sha256(folder / "index.json"),
        )

    def verify(self) -> None:
        """Hash all pixels. Raises UserError: they are not those that prepare wrote."""
        path = self.folder / "images.npy"
        if artifacts.sha256(path) != self.images_sha256:
            raise UserError(f"{path}: damaged, not the pixels of index.json; {REMEDY}")

    def made_of(self) -> dict[str, str]:
        """The hashes that tell this data set from any other: for provenance and fingerprints."""
        return {"images": self.images_sha256, "index": self.index_sha256}

    def origins(self) -> list[str]:
        """Where each record was read from (`train/cat/0.png`), for people. Raises UserError: no source.json."""
        found = artifacts.read_json(self.folder / "source.json", SOURCE_SCHEMA)["origins"]
        return [str(origin) for origin in found]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of one split, in index order."""
        return np.flatnonzero(self.splits == split)


def validate_index(index: dict[str, Any], path: Path) -> None:
    """Raise UserError where an index.json does not hold what the rest of the pipeline takes from it."""
    artifacts.expect(
        index, path, REMEDY, classes=list, image_size=int, images_sha256=str, records=list
    )
    for record in index["records"]:
        artifacts.expect(record, path, REMEDY, sha256=str, label=int, split=str, student_label=bool)
    records, classes = index["records"], index["classes"]
    counts = {split: sum(r["split"] == split for r in records) for split in SPLITS}
    if not all(isinstance(name, str) for name in classes) or len(classes) < 2:
        raise UserError(f"{path}: damaged, classes are {reprlib.repr(classes)}; {REMEDY}")
    if sum(counts.values()) != len(records) or not all(counts.values()):
        raise UserError(f"{path}: damaged, {len(records)} records with splits {counts}; {REMEDY}")
    for record in records:
        hidden = record["label"] == UNLABELLED
        if not UNLABELLED <= record["label"] < len(classes) or (
            hidden and (record["student_label"] or record["split"] != "train")
        ):
            raise UserError(f"{path}: damaged, a record is {reprlib.repr(record)}; {REMEDY}")


def _pixels(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """The array of images.npy, memory-mapped. Raises UserError: no array, or another than the index needs."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    except (
        Exception
    ) as error:  # NumPy parses the header as Python text, and raises what that raises
        raise UserError(f"{path}: damaged, no array ({error}); {REMEDY}") from None
    if not isinstance(images, np.ndarray) or images.shape != shape or images.dtype != np.uint8:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else "an archive"
        raise UserError(f"{path}: damaged, it is {got} for {shape} bytes; {REMEDY}")
    return images


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    chosen: NDArray[np.int64] = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    return chosen


def normalised(images: NDArray[np.uint8], preprocess: dict[str, Any]) -> NDArray[np.float32]:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S): /255, minus mean, over std; the same arithmetic everywhere."""
    x = images.astype(np.float32) / np.float32(255)
    x = (x - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
