"""The pictures a check or a calibration runs on: a folder's, or seeded smooth ones. Never zeros, never noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from exporters.artifact import metadata
from exporters.artifact.session import Array, Session
from pipeline.core.errors import UserError
from pipeline.data.decoding import square_rgb
from pipeline.data.images import SUFFIXES, image_files, read_square
from pipeline.data.prepared import UNLABELLED, Prepared, normalised, spread

IMAGENET = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225]}


def smooth(count: int, height: int, width: int, seed: int = 0) -> Array:
    """(count, 3, height, width) float32: random sums of the 16 lowest cosines a channel, unit variance.

    Smooth like a photograph, different from each other, and the same on every machine.
    """
    generator = np.random.default_rng(seed)
    weights = generator.standard_normal((count, 3, 4, 4)) / 4
    rows, columns = _cosines(height), _cosines(width)
    images: Array = np.einsum("ncij,iy,jx->ncyx", weights, rows, columns).astype(np.float32)
    return images


def _cosines(length: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """(4, length): the four lowest cosines, each of mean square 1."""
    position = (np.arange(length) + 0.5) / length
    waves = np.cos(np.pi * np.arange(4)[:, None] * position)
    waves[1:] *= np.sqrt(2)
    return waves


def images_from_folder(folder: Path, session: Session, limit: int) -> Array:
    """Images of a folder as `labelled` gives them, without the labels."""
    return labelled_images(folder, session, limit)[0]


def labelled_images(folder: Path, session: Session, limit: int) -> tuple[Array, NDArray[np.int64]]:
    """Up to `limit` images of a folder, prepared as the artefact's own notes say, and their labels, -1 unknown.

    An image's label is the index of its folder's name in the classes of the notes. An artefact without notes
    gets ImageNet's mean and std, and stdout says so.
    Raises UserError: no such folder, no image, an input that is not square.
    """
    if not folder.is_dir():
        raise UserError(f"{folder}: not a folder; give a folder of images or a prepared one")
    notes = metadata.preprocessing(session.metadata)
    height, width = session.input_shape[2:]
    if notes is None:
        if height != width:
            raise UserError(
                f"input is {height}x{width} and carries no preprocessing; need a square"
            )
        print("no preprocessing in the artefact's metadata: ImageNet's mean and std are assumed")
        notes = {"image_size": height, **IMAGENET}
    pictures, names = zip(*read_folder(folder, notes["image_size"], limit), strict=True)
    places = {name: place for place, name in enumerate(metadata.classes(session.metadata))}
    labels = np.array([places.get(name, -1) for name in names], dtype=np.int64)
    return normalised(np.stack(pictures), notes), labels


def probe_images(session: Session, count: int = 10) -> Array:
    """Smooth images of the size the session takes: `count`, rounded up to its own batch."""
    batch = session.input_shape[0] or 1
    return smooth(math.ceil(max(count, 2) / batch) * batch, *session.input_shape[2:])


def run_batches(session: Session, x: Array) -> Array:
    """Run all of x (N, 3, S, S), 16 at a time or as the artefact's own batch demands -> (N, K).

    Raises UserError: N is not a multiple of the artefact's fixed batch, outputs that are no logits.
    """
    batch = session.input_shape[0] or 16
    if not len(x) or (session.input_shape[0] and len(x) % batch):
        raise UserError(
            f"images: got {len(x)} for a network of batches of {batch}; expected a multiple of {batch}; give more"
        )
    parts = (x[i : i + batch] for i in range(0, len(x), batch))
    return np.concatenate([_logits(session.run(part), len(part)) for part in parts])


def _logits(made: Any, images: int) -> Array:
    """`made`, if it is a floating array with a row an image."""
    told = (
        f"{made.dtype} {list(made.shape)}" if isinstance(made, np.ndarray) else type(made).__name__
    )
    if not isinstance(made, np.ndarray) or made.dtype.kind != "f" or made.ndim < 2:
        raise UserError(f"the first output is {told}; allowed: floating logits, (images, classes)")
    if len(made) != images:
        raise UserError(f"the first output is {told} for {images} images; allowed: a row an image")
    return made


def read_folder(
    folder: Path, size: int, limit: int
) -> Iterator[tuple[NDArray[np.uint8], str | None]]:
    """At most `limit` images of any folder, evenly spaced in name order, and their classes.

    Each (size, size, 3) uint8 with the name of the folder it lies in, None directly in `folder`; of a prepared
    folder the val split. Raises UserError: no image there, a broken one.
    """
    if (folder / "index.json").is_file():
        prepared = Prepared.open(folder)
        for row in spread(prepared.rows("val"), limit):
            label = int(prepared.labels[row])
            name = None if label == UNLABELLED else prepared.classes[label]
            yield square_rgb(Image.fromarray(prepared.images[row]), size), name
        return
    found = image_files(folder)
    if not found:
        raise UserError(f"{folder}: no images found; allowed: {', '.join(sorted(SUFFIXES))}")
    for place in spread(np.arange(len(found)), limit):
        path = found[place]
        name = path.parent.name if path.parent != folder else None
        yield read_square(path, size), name
