"""Images for a check or a calibration: a folder's, or seeded smooth ones, never zeros or noise."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exporters.artifact import metadata
from exporters.artifact.session import Array, Session
from pipeline.core.errors import UserError
from pipeline.data.decoding import CROPS, decode, square_for
from pipeline.data.images import SUFFIXES, image_files, read_pixels
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


def _cosines(length: int) -> NDArray[np.float64]:
    """(4, length): the four lowest cosines, each of mean square 1."""
    position = (np.arange(length) + 0.5) / length
    waves: NDArray[np.float64] = np.cos(np.pi * np.arange(4)[:, None] * position)
    waves[1:] *= np.sqrt(2)
    return waves


def probe_images(session: Session, count: int = 10) -> Array:
    """Smooth images of the session's input size: `count`, rounded up to its own batch."""
    batch = session.input_shape[0] or 1
    return smooth_for(session, math.ceil(max(count, 2) / batch) * batch)


def smooth_for(session: Session, count: int) -> Array:
    """`count` smooth images (count, C, H, W) of the session's channels and size."""
    _, channels, height, width = session.input_shape
    return smooth(count, height, width)[:, :channels]


def images_from_folder(folder: Path, session: Session, limit: int) -> Array:
    """Images of a folder as `labelled_images` gives them, without the labels."""
    return labelled_images(folder, session, limit)[0]


def labelled_images(folder: Path, session: Session, limit: int) -> tuple[Array, NDArray[np.int64]]:
    """Up to `limit` images (N, C, S, S) of a folder, prepared for the artefact, and labels (N,), -1 unknown.

    The artefact's metadata says how to prepare them; one without gets ImageNet's mean and std, and stdout
    says so. An artefact of one channel gets their luma. A label is the index of the folder's name in the
    metadata's classes.
    Raises UserError: no such folder, no image, an input that is not square.
    """
    if not folder.is_dir():
        kind = "a file" if folder.exists() else "no such path"
        raise UserError(
            f"{folder}: not a folder; got {kind}; expected a folder of images or a prepared folder; "
            "check the path"
        )
    preprocess = metadata.preprocessing(session.metadata)
    height, width = session.input_shape[2:]
    if preprocess is None:
        if height != width:
            raise UserError(
                f"input: got {height}x{width} and no preprocessing metadata; expected a square input; "
                "export the model with equal height and width"
            )
        print("no preprocessing in the artefact's metadata: ImageNet's mean and std are assumed")
        preprocess = {"image_size": height, "crop": CROPS["center"], **IMAGENET}
    if preprocess["crop"] not in CROPS.values():
        raise UserError(
            f"metadata crop: got {preprocess['crop'][:40]!r}; expected one of {[*CROPS.values()]}; export it again"
        )
    pixels, names = zip(*read_folder(folder, preprocess, limit), strict=True)
    index = {name: i for i, name in enumerate(metadata.classes(session.metadata))}
    labels = np.array([index.get(name, -1) for name in names], dtype=np.int64)
    images = normalised(np.stack(pixels), preprocess)
    return (images if session.input_shape[1] == 3 else _grey(images)), labels


def _grey(images: Array) -> Array:
    """Normalised RGB (N, 3, S, S) -> (N, 1, S, S), weighted as ITU-R 601 luma."""
    luma = np.array([0.299, 0.587, 0.114], np.float32)
    grey: Array = np.einsum("nchw,c->nhw", images, luma)[:, None]
    return grey


def read_folder(
    folder: Path, preprocess: dict[str, Any], limit: int
) -> Iterator[tuple[NDArray[np.uint8], str | None]]:
    """At most `limit` images of any folder, evenly spaced in name order, and their classes.

    Each (S, S, 3) uint8, as `preprocess` asks, with the name of the folder it lies in, None directly in `folder`;
    of a prepared folder the val split. Raises UserError: no image there, a broken one.
    """
    if (folder / "index.json").is_file():
        prepared = Prepared.open(folder)
        for row in spread(prepared.rows("val"), limit):
            label = int(prepared.labels[row])
            name = None if label == UNLABELLED else prepared.classes[label]
            yield square_for(prepared.images.image(row), preprocess), name
        return
    paths = image_files(folder)
    if not paths:
        suffixes = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{folder}: no images found; expected {suffixes}; give a folder of images")
    convert = partial(square_for, preprocess=preprocess)
    for i in spread(np.arange(len(paths)), limit):
        path = paths[i]
        name = path.parent.name if path.parent != folder else None
        yield read_pixels(partial(decode, path), str(path), convert), name


def run_batches(session: Session, x: Array) -> Array:
    """Run all of x (N, C, S, S), 16 at a time or in the artefact's own batch -> logits (N, K).

    Raises UserError: N is not a multiple of the artefact's fixed batch, outputs that are no logits.
    """
    batch = session.input_shape[0] or 16
    if not len(x) or (session.input_shape[0] and len(x) % batch):
        raise UserError(
            f"images: got {len(x)}; expected a multiple of the model's fixed batch, {batch}; "
            "export it with a dynamic batch"
        )
    batches = (x[i : i + batch] for i in range(0, len(x), batch))
    name = getattr(session, "name", "")  # a checkpoint in torch has none
    what = f"{name}: first output" if name else "first output"
    return np.concatenate([_checked_logits(session.run(b), len(b), what) for b in batches])


def _checked_logits(output: Any, images: int, what: str) -> Array:
    """The output (N, K), of (N, K, 1, 1) too, if it is a floating-point array with one row per image."""
    is_array = isinstance(output, np.ndarray)
    kind = f"{output.dtype} {list(output.shape)}" if is_array else type(output).__name__
    if is_array and output.shape[2:] == (1, 1):
        output = output[:, :, 0, 0]
    if not is_array or output.dtype.kind != "f" or output.ndim != 2 or len(output) != images:
        raise UserError(
            f"{what}: got {kind} for {images} images; expected floating-point logits "
            "(images, classes); export the logits as the first output"
        )
    logits: Array = output
    return logits
