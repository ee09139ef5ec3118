"""The images of a source, decoded once, to the pixels of a prepared folder."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data.decoding import square_rgb
from pipeline.data.images import BrokenImage, read_pixels
from pipeline.data.pixels import (
    ELONGATED,
    PACKED_FILE,
    SQUARES_FILE,
    default_stored_side,
    encode,
    reduced,
)
from pipeline.prepare.settings import Prepare
from pipeline.prepare.sources.sample import Sample, SourceImages, expanded, shortened

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
Converted = TypeVar("Converted")


@dataclass
class Reading:
    """What is known of the images that were read so far, in the order of the source."""

    samples: list[Sample] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    elongations: list[float] = field(default_factory=list)  # longer over shorter side
    skipped: list[dict[str, str]] = field(default_factory=list)  # `origin` and `reason`
    animated: list[str] = field(default_factory=list)  # origins of files with several frames

    def order(self) -> list[int]:
        """Return the positions in the order of the pixels' SHA-256; equal ones by split and label."""
        keys = [
            (digest, f"{sample.split} {sample.label}", position)
            for position, (digest, sample) in enumerate(
                zip(self.digests, self.samples, strict=True)
            )
        ]
        return sorted(range(len(keys)), key=keys.__getitem__)

    def elongation(self) -> float:
        """Return the median of longer over shorter side."""
        return float(np.median(self.elongations)) if self.elongations else 1.0

    def notes(self) -> list[str]:
        """Lines for the user."""
        if not self.animated:
            return []
        return [
            f"several frames or pages, of which the first is read: {len(self.animated)} files "
            f"({shortened(self.animated, 3)})"
        ]


@dataclass(frozen=True)
class Decoded:
    """The images that were read, in the order of their pixels' SHA-256."""

    path: Path  # of the pixels
    stored: str  # raw, or how each is encoded
    crop_mode: str
    samples: list[Sample]
    digests: list[str]
    lengths: list[int]  # bytes of each encoded image; none where they are raw
    skipped: list[dict[str, str]]
    notes: list[str]


def decode_images(source: SourceImages, config: Prepare, folder: Path) -> Decoded:
    """Decode every image of a source into `folder`: as squares, or packed.

    Raises BrokenImage (unless `on_error: skip`); UserError: disk full.
    """
    if config.stored != "packed":
        squares = _squares(source, config, folder / SQUARES_FILE)
        if squares is not None:
            return squares
        (folder / SQUARES_FILE).unlink()
    return _packed(source, config, folder / PACKED_FILE)


def _squares(source: SourceImages, config: Prepare, path: Path) -> Decoded | None:
    """Write (N, S, S, 3) uint8; None where `auto` meets an image that would lose pixels by it."""
    shape = (len(source.samples), config.image_size, config.image_size, 3)
    images = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    mode = "center" if config.crop_mode == "auto" else config.crop_mode

    def convert(image: Image.Image) -> tuple[tuple[int, int], NDArray[np.uint8]]:
        return image.size, square_rgb(image, config.image_size, crop_mode=mode)

    reading = Reading()
    for sample in source.samples:
        converted = _read(sample, convert, reading, config)
        if converted is None:
            continue
        (width, height), pixels = converted
        if config.stored == "auto" and not width == height <= config.image_size:
            return None
        if not reading.samples:
            _reserve(path)
        images[len(reading.samples)] = pixels
        _note(reading, sample, hashlib.sha256(pixels.tobytes()).hexdigest(), (width, height))
    order = reading.order()
    _reorder(images, order)
    images.flush()
    if reading.skipped:
        _shorten(path, images[: len(order)])
    notes = reading.notes()
    if config.crop_mode == "auto" and reading.elongation() > ELONGATED:
        notes.append(
            f"images of {reading.elongation():.1f}:1 (median), of which the middle is kept; prepare.crop_mode: "
            "squash keeps all of it"
        )
    return _decoded(path, "raw", mode, reading, order, [], notes)


def _packed(source: SourceImages, config: Prepare, path: Path) -> Decoded:
    """Write the encoded images one behind the other."""
    side = config.stored_side or default_stored_side(config.image_size)
    unordered = path.with_suffix(".unordered")
    reading, lengths = Reading(), list[int]()
    with _room_on(path.parent), unordered.open("wb") as file:
        for sample in source.samples:
            image = _read(sample, partial(reduced, side=side), reading, config)
            if image is None:
                continue
            encoded = encode(image, config.encoding)
            file.write(encoded)
            lengths.append(len(encoded))
            digest = hashlib.sha256(f"{image.width}x{image.height} ".encode() + image.tobytes())
            _note(reading, sample, digest.hexdigest(), image.size)
    order = reading.order()
    ends = np.cumsum(lengths, dtype=np.int64)
    with _room_on(path.parent), unordered.open("rb") as file, path.open("wb") as out:
        for position in order:
            file.seek(int(ends[position]) - lengths[position])
            out.write(file.read(lengths[position]))
    unordered.unlink()
    notes, mode = reading.notes(), config.crop_mode
    if mode == "auto":
        mode = "squash" if reading.elongation() > ELONGATED else "center"
        if mode == "squash":
            notes.append(
                f"images of {reading.elongation():.1f}:1 (median): both sides are resized (crop_mode squash); "
                "prepare.crop_mode: center keeps the shape and crops"
            )
    megabytes = sum(lengths) / 1e6
    notes.append(
        f"images stored as {config.encoding}, aspect kept, shorter side up to {side} px: {megabytes:.3g} MB"
    )
    ordered = [lengths[position] for position in order]
    return _decoded(path, config.encoding, mode, reading, order, ordered, notes)


def _decoded(
    path: Path,
    stored: str,
    mode: str,
    reading: Reading,
    order: Sequence[int],
    lengths: list[int],
    notes: list[str],
) -> Decoded:
    samples, digests = reading.samples, reading.digests
    return Decoded(
        path,
        stored,
        mode,
        [samples[i] for i in order],
        [digests[i] for i in order],
        lengths,
        reading.skipped,
        notes,
    )


def _read(
    sample: Sample, convert: Callable[[Image.Image], Converted], reading: Reading, config: Prepare
) -> Converted | None:
    """Read one image; None where it is broken and left out."""
    try:
        return read_pixels(
            partial(_noting_frames, sample, reading.animated), sample.origin, convert
        )
    except BrokenImage as error:
        if config.on_error == "stop":
            raise _with_path(error, config) from None
        reading.skipped.append({"origin": error.origin, "reason": error.reason})
        return None


def _note(reading: Reading, sample: Sample, digest: str, size: tuple[int, int]) -> None:
    reading.samples.append(sample)
    reading.digests.append(digest)
    reading.elongations.append(max(size) / min(size))


@contextmanager
def _room_on(folder: Path) -> Iterator[None]:
    """Raise UserError where the disk is full."""
    try:
        yield
    except OSError as error:
        if error.errno not in FULL:
            raise
        raise UserError(
            f"{folder}: disk space: got {error.strerror}; expected room for the prepared images, twice while they "
            "are put in order; free space, or lower prepare.stored_side"
        ) from None


def _noting_frames(sample: Sample, animated: list[str]) -> Image.Image:
    image = sample.read()
    if image.info.get("frames") == "several":
        animated.append(sample.origin)
    return image


def _with_path(error: BrokenImage, config: Prepare) -> BrokenImage:
    """Return the error with the full path of a file below `prepare.path`."""
    path = Path(expanded(config.path) or "") / error.origin
    origin = str(path) if os.path.lexists(path) else error.origin
    return BrokenImage(origin, error.reason, "repair or remove it, or set prepare.on_error: skip")


def _reserve(path: Path) -> None:
    """Reserve the disk space: a memory map on a full disk kills the process. Raises UserError: full."""
    try:
        with path.open("rb+") as f:
            os.posix_fallocate(f.fileno(), 0, path.stat().st_size)
    except OSError as error:
        if error.errno not in FULL:
            return  # a file system that cannot reserve
        raise UserError(
            f"{path.parent}: disk space: got {error.strerror}; expected {path.stat().st_size / 1e9:.2f} GB for "
            "the prepared images; free space, or lower prepare.image_size"
        ) from None


def _reorder(images: NDArray[np.uint8], order: Sequence[int]) -> None:
    """images[i] = images[order[i]] for every i, in place, one image in memory: cycle by cycle."""
    done = np.zeros(len(order), dtype=bool)
    for start in range(len(order)):
        if done[start] or order[start] == start:
            continue
        first, at = images[start].copy(), start
        while order[at] != start:
            images[at] = images[order[at]]
            done[at] = True
            at = order[at]
        images[at] = first
        done[at] = True


def _shorten(path: Path, images: NDArray[np.uint8]) -> None:
    """Write the file anew with the images that were read."""
    shorter = path.with_suffix(".shorter.npy")
    np.save(shorter, images)
    shorter.replace(path)
