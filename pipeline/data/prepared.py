"""The prepared images of a data set: pixels, labels and splits. Torch-free.

Pixels in `images.npy` or `images.bin` (pipeline.data.pixels); `index.json` with a record per image, in the order
of the pixels' SHA-256, so that the same images give the same bytes whatever container they came in; `source.json`
says where each came from.
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
from pipeline.data.decoding import CROPS
from pipeline.data.pixels import ENCODINGS, PACKED_FILE, REMEDY, SQUARES_FILE, Packed, Squares

SCHEMA = "cakd.prepared/3"
SOURCE_SCHEMA = "cakd.source/1"
SPLITS = ("train", "val", "test")
UNLABELLED = -1
MAX_SIDE = 4096  # pixels of a prepared image


@dataclass(frozen=True)
class Prepared:
    """An opened prepared folder of N images and K classes."""

    folder: Path
    images: Squares | Packed
    sha256: tuple[str, ...]  # (N,), of each image's pixels
    labels: NDArray[np.int64]  # (N,), UNLABELLED or a class
    splits: NDArray[np.str_]  # (N,)
    student_label: NDArray[np.bool_]  # (N,), whether the student may use the label
    classes: tuple[str, ...]  # (K,)
    image_size: int  # S, pixels a side of the network's input
    crop_mode: str  # how an image that is no square becomes one: center | squash
    images_sha256: str  # of images.npy or images.bin
    index_sha256: str  # of index.json: labels, splits, which labels the student may use

    @classmethod
    def open(cls, folder: Path | str) -> Prepared:
        """Open a prepared folder, checking the index and the shape of the pixels, not their hash (`verify`).

        Raises UserError: missing, damaged.
        """
        folder = Path(folder)
        index = artifacts.read_json(folder / "index.json", SCHEMA)
        validate_index(index, folder / "index.json")
        records = index["records"]
        return cls(
            folder=folder,
            images=_images(folder, index),
            sha256=tuple(r["sha256"] for r in records),
            labels=np.array([r["label"] for r in records], dtype=np.int64),
            splits=np.array([r["split"] for r in records]),
            student_label=np.array([r["student_label"] for r in records], dtype=bool),
            classes=tuple(index["classes"]),
            image_size=index["image_size"],
            crop_mode=index["crop_mode"],
            images_sha256=index["images_sha256"],
            index_sha256=artifacts.sha256(folder / "index.json"),
        )

    def verify(self) -> None:
        """Hash all pixels. Raises UserError: they are not those that prepare wrote."""
        path = self.folder / (SQUARES_FILE if isinstance(self.images, Squares) else PACKED_FILE)
        if (got := artifacts.sha256(path)) != self.images_sha256:
            raise UserError(
                f"{path}: damaged: SHA-256: got {got[:12]}; expected {self.images_sha256[:12]}, that of "
                f"index.json; {REMEDY}"
            )

    def hashes(self) -> dict[str, str]:
        """Return the hashes of pixels and index, which identify the data set in provenance and fingerprints."""
        return {"images": self.images_sha256, "index": self.index_sha256}

    def origins(self) -> list[str]:
        """Read where each image came from (`train/cat/0.png`). Raises UserError: no source.json."""
        origins = artifacts.read_json(self.folder / "source.json", SOURCE_SCHEMA)["origins"]
        return [str(origin) for origin in origins]

    def rows(self, split: str) -> NDArray[np.int64]:
        """Return the row numbers of one split, ascending."""
        return np.flatnonzero(self.splits == split)


def validate_index(index: dict[str, Any], path: Path) -> None:
    """Check the content of an index.json. Raises UserError: keys, types or values that prepare does not write."""
    artifacts.expect(
        index, path, REMEDY, classes=list, image_size=int, images_sha256=str, records=list
    )
    artifacts.expect(index, path, REMEDY, stored=str, crop_mode=str)
    for key, allowed in (("stored", ("raw", *ENCODINGS)), ("crop_mode", tuple(CROPS))):
        if index[key] not in allowed:
            raise UserError(
                f"{path}: damaged: {key}: got {reprlib.repr(index[key])}; expected one of {', '.join(allowed)}; "
                f"{REMEDY}"
            )
    keys = {"sha256": str, "label": int, "split": str, "student_label": bool}
    keys |= {} if index["stored"] == "raw" else {"bytes": int}
    for record in index["records"]:
        artifacts.expect(record, path, REMEDY, **keys)
    records, classes = index["records"], index["classes"]
    counts = {split: sum(r["split"] == split for r in records) for split in SPLITS}
    if not all(isinstance(name, str) for name in classes) or len(classes) < 2:
        raise UserError(
            f"{path}: damaged: classes: got {reprlib.repr(classes)}; expected 2 names or more; {REMEDY}"
        )
    if sum(counts.values()) != len(records) or not all(counts.values()):
        raise UserError(
            f"{path}: damaged: splits: got {counts} of {len(records)} records; expected train, val and test, none "
            f"empty; {REMEDY}"
        )
    for record in records:
        hidden = record["label"] == UNLABELLED
        if not UNLABELLED <= record["label"] < len(classes) or (
            hidden and (record["student_label"] or record["split"] != "train")
        ):
            raise UserError(
                f"{path}: damaged: a record: got {reprlib.repr(record)}; expected a label below {len(classes)}, "
                f"or -1 in train; {REMEDY}"
            )


def _images(folder: Path, index: dict[str, Any]) -> Squares | Packed:
    """Memory-map the pixels. Raises UserError: not of the shape, or of the length, that the index needs."""
    records, size = index["records"], index["image_size"]
    if index["stored"] == "raw":
        return Squares(_array(folder / SQUARES_FILE, (len(records), size, size, 3)))
    path, lengths = folder / PACKED_FILE, [record["bytes"] for record in records]
    try:
        length = path.stat().st_size
    except OSError as error:
        raise UserError(f"{path}: damaged: {error.strerror}; {REMEDY}") from None
    if min(lengths) <= 0 or sum(lengths) != length:
        raise UserError(
            f"{path}: damaged: got {length} bytes; expected {sum(lengths)}, the images of index.json; {REMEDY}"
        )
    data: Any = np.memmap(path, dtype=np.uint8, mode="r")
    return Packed(path, data, lengths, size, index["crop_mode"])


def _array(path: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Memory-map images.npy. Raises UserError: not an array, or not of the shape that the index needs."""
    try:
        images = np.load(path, mmap_mode="r", allow_pickle=False)
    # NumPy evaluates the header as Python text and raises whatever that raises.
    except Exception as error:
        raise UserError(f"{path}: damaged: not a NumPy array ({error}); {REMEDY}") from None
    if not isinstance(images, np.ndarray) or images.shape != shape or images.dtype != np.uint8:
        got = f"{images.dtype} {images.shape}" if isinstance(images, np.ndarray) else "an archive"
        raise UserError(f"{path}: damaged: got {got}; expected uint8 {shape}; {REMEDY}")
    return images


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Select at most `count` rows, evenly spaced."""
    if len(rows) <= count:
        return rows
    selected: NDArray[np.int64] = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    return selected


def normalised(images: NDArray[np.uint8], preprocess: dict[str, Any]) -> NDArray[np.float32]:
    """Normalise uint8 (B, S, S, 3) to float32 (B, 3, S, S): / 255, minus mean, over std.

    `views.normalise` in NumPy, for machines without torch.
    """
    x = images.astype(np.float32) / np.float32(255)
    x = (x - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
