"""The original Python archives of CIFAR-10 and -100 (Krizhevsky, 2009), packed or not; nothing is executed."""

from __future__ import annotations

import reprlib
import tarfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pipeline.core.errors import UserError, nearest
from pipeline.prepare.sources import unpickle
from pipeline.prepare.sources.sample import Columns, Sample, SourceImages, existing, legible

EXPECTED = "cifar-10-python.tar.gz, cifar-100-python.tar.gz, or the folder one of them unpacks to"
SIDE = 32
MAX_FILE_BYTES = 2**28  # bytes of one file; the largest of the originals has 155 MB


@dataclass(frozen=True)
class Layout:
    """The members of one archive: split -> files, the file of names, label key -> key of its names."""

    folder: str
    files: dict[str | None, tuple[str, ...]]
    meta: str
    names: dict[str, str]

    def members(self) -> set[str]:
        """Every file that is read."""
        return {self.meta}.union(*self.files.values())


LAYOUTS = (
    Layout(
        "cifar-10-batches-py",
        {None: tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)},
        "batches.meta",
        {"labels": "label_names"},
    ),
    Layout(
        "cifar-100-python",
        {None: ("train",), "test": ("test",)},
        "meta",
        {"fine_labels": "fine_label_names", "coarse_labels": "coarse_label_names"},
    ),
)


def read(path: str | None, columns: Columns) -> SourceImages:
    """Read the train and the test split.

    `prepare.label_column` of CIFAR-100: `fine_labels` (the default) or `coarse_labels`.
    Raises UserError: no such archive, a member missing or damaged, a pickle that names anything but arrays.
    """
    columns.only("cifar", "label")
    root = existing("cifar", path, EXPECTED)
    layout, member = _folder(root) if root.is_dir() else _archive(root)
    column = columns.label or next(iter(layout.names))
    if column not in layout.names:
        raise UserError(
            f"prepare.label_column: got {column!r}; {nearest(column, layout.names)}, or null for the first"
        )
    meta = unpickle.loads(member(layout.meta), f"{root}: {layout.meta}")
    classes = _texts(meta, layout.names[column], f"{root}: {layout.meta}")
    samples: list[Sample] = []
    for split, names in layout.files.items():
        for name in names:
            batch = unpickle.loads(member(name), f"{root}: {name}")
            samples += _samples(batch, column, split, f"{root}: {name}", len(classes))
    others = [n for n in layout.names if n != column]
    notes = [f"labels: {column} (prepare.label_column: also {', '.join(others)})"] if others else []
    return SourceImages(classes, samples, notes)


Member = Callable[[str], bytes]


def _folder(root: Path) -> tuple[Layout, Member]:
    for layout in LAYOUTS:
        for folder in (root / layout.folder, root):
            if (folder / layout.meta).is_file():
                return layout, partial(_read_file, folder)
    raise UserError(
        f"prepare.path: {root}: got no batches.meta (CIFAR-10) or meta (CIFAR-100); expected {EXPECTED}; "
        "correct the path"
    )


def _read_file(folder: Path, name: str) -> bytes:
    try:
        if (size := (folder / name).stat().st_size) > MAX_FILE_BYTES:
            raise _too_large(folder / name, size)
        return (folder / name).read_bytes()
    except OSError as error:
        raise UserError(
            f"{folder / name}: cannot be read ({error.strerror}); unpack the whole archive again"
        ) from None


def _archive(path: Path) -> tuple[Layout, Member]:
    """Read the members in memory, by name: nothing of the archive is written to the disk."""
    try:
        with tarfile.open(path) as tar:
            files = {m.name: m for m in tar.getmembers() if m.isfile()}
            known = {f"{layout.folder}/{layout.meta}": layout for layout in LAYOUTS}
            layout = next((known[n] for n in files if n in known), None)
            if layout is None:
                some = ", ".join(sorted(files)[:3]) or "nothing"
                raise UserError(
                    f"prepare.path: {path}: got {some}; expected {EXPECTED}; correct the path"
                )
            inside = f"{layout.folder}/"
            members = {
                name.removeprefix(inside): _extracted(tar, m)
                for name, m in files.items()
                if name.removeprefix(inside) in layout.members()
            }
    except UserError:
        raise
    except Exception as error:  # a packer's library raises whatever the bytes lead it to
        raise UserError(
            f"{path}: not a readable archive ({error}); expected {EXPECTED}; fetch it again"
        ) from None

    def member(name: str) -> bytes:
        if name not in members:
            raise UserError(
                f"{path}: got no {inside}{name}; expected the whole archive; fetch it again"
            )
        return members[name]

    return layout, member


def _extracted(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_FILE_BYTES:
        raise _too_large(member.name, member.size)
    stream = tar.extractfile(member)
    assert stream is not None
    return stream.read()


def _too_large(name: Path | str, size: int) -> UserError:
    return UserError(
        f"{name}: got {size:,} bytes; expected at most {MAX_FILE_BYTES:,} in a file of CIFAR; give {EXPECTED}"
    )


def _value(batch: Any, key: str, origin: str) -> Any:
    if not isinstance(batch, dict) or key not in batch:
        keys = ", ".join(map(str, batch)) if isinstance(batch, dict) else type(batch).__name__
        raise UserError(f"{origin}: got {keys}; expected the key {key!r}; fetch it again")
    return batch[key]


def _texts(batch: Any, key: str, origin: str) -> list[str]:
    """A list of names. Raises UserError: no list, or not of texts."""
    names = _value(batch, key, origin)
    if not isinstance(names, list) or not all(isinstance(n, str | bytes) for n in names):
        raise UserError(
            f"{origin}: {key}: got {reprlib.repr(names)}; expected a list of names; fetch it again"
        )
    return [n.decode(errors="backslashreplace") if isinstance(n, bytes) else n for n in names]


def _samples(
    batch: Any, column: str, split: str | None, origin: str, n_classes: int
) -> list[Sample]:
    """One batch: `data` (n, 3072) uint8, rows of 1,024 red, green and blue values."""
    pixels, labels = _value(batch, "data", origin), _value(batch, column, origin)
    if not isinstance(labels, list):
        raise UserError(
            f"{origin}: {column}: got {reprlib.repr(labels)}; expected a list; fetch it again"
        )
    names = [str(i) for i in range(len(labels))]
    if "filenames" in batch:
        names = _texts(batch, "filenames", origin)
    shape = pixels.shape if isinstance(pixels, np.ndarray) else type(pixels).__name__
    if shape != (len(labels), 3 * SIDE * SIDE) or len(names) != len(labels):
        raise UserError(
            f"{origin}: data: got {shape} for {len(labels)} labels; expected ({len(labels)}, 3072); fetch it again"
        )
    images = pixels.reshape(-1, 3, SIDE, SIDE).transpose(0, 2, 3, 1)
    samples = []
    for name, image, label in zip(names, images, labels, strict=True):
        if not (type(label) is int and 0 <= label < n_classes):
            raise UserError(
                f"{origin}: label of {name}: got {label!r}; expected 0 to {n_classes - 1}; fetch it again"
            )
        read = partial(_image, image)
        location = legible(f"{origin.rpartition(': ')[2]}/{name}")
        samples.append(Sample(location, read, label, split))
    return samples


def _image(pixels: Any) -> Image.Image:
    return Image.fromarray(np.ascontiguousarray(pixels))
