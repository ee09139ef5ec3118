"""Image galleries of the report and their tables: data, mistakes, attention. Torch-free.

Images are data URIs: the page needs no other file.
"""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.core import artifacts
from pipeline.data.prepared import UNLABELLED, Prepared, spread

Pixels = NDArray[np.uint8]  # (h, w, 3)
MAX_SIDE_PIXELS = 160  # pixels of a side in the report
CLASSES = 20  # of the sample grid and of the confusion matrix
PAIRS = 8
OTHER = "other"
SAMPLES = 4  # images per class


def gallery(evidence: Mapping[str, Any], prepared: Prepared, shipped: str) -> dict[str, Any]:
    """`data`, `mistakes` and `attention` of one run, as templates/index.html shows them."""
    return {
        "data": data_page(prepared),
        "mistakes": mistakes(evidence, prepared, shipped),
        "attention": attention(evidence, prepared, shipped),
    }


def uri(pixels: Pixels) -> str:
    """An image as a data URI: PNG if it is small, else JPEG of at most MAX_SIDE_PIXELS a side."""
    image = Image.fromarray(np.ascontiguousarray(pixels))
    small = image.width <= 64
    image.thumbnail((MAX_SIDE_PIXELS, MAX_SIDE_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if small else "JPEG", **({} if small else {"quality": 88}))
    kind = "png" if small else "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def data_page(prepared: Prepared) -> dict[str, Any]:
    """Images per class and split, labels of the student, samples, duplicates and skipped images."""
    index = artifacts.read_json(prepared.folder / "index.json")
    origins = prepared.origins()
    train = prepared.rows("train")
    displayed = spread(np.arange(len(prepared.classes)), CLASSES)
    return {
        "classes": list(prepared.classes),
        "counts": counts(prepared),
        "unlabelled": int((prepared.labels[train] == UNLABELLED).sum()),
        "image_size": prepared.image_size,
        "samples": [
            (
                prepared.classes[label],
                [uri(_pixels(prepared, r)) for r in _of_class(prepared, train, label)[:SAMPLES]],
            )
            for label in displayed.tolist()
        ],
        "more_classes": len(prepared.classes) - len(displayed),
        "skipped": index["skipped"],
        "duplicates": [
            {**d, "origins": [origins[r] for r in d["rows"]]} for d in index["duplicates"]
        ],
    }


def _pixels(prepared: Prepared, row: int) -> Pixels:
    return np.asarray(prepared.images.image(row))


def _of_class(prepared: Prepared, rows: NDArray[np.int64], label: int) -> NDArray[np.int64]:
    of_class: NDArray[np.int64] = rows[prepared.labels[rows] == label]
    return of_class


def counts(prepared: Prepared) -> dict[str, list[int]]:
    """Images per class, in class order: train with and without a label for the student, val, test."""
    n = len(prepared.classes)

    def by_class(selected: NDArray[np.bool_]) -> list[int]:
        labels = prepared.labels[selected & (prepared.labels != UNLABELLED)]
        return np.bincount(labels, minlength=n).tolist()  # type: ignore[no-any-return]

    train, labelled = prepared.splits == "train", prepared.student_label
    return {
        "train, label seen": by_class(train & labelled),
        "train, label hidden": by_class(train & ~labelled),
        "val": by_class(prepared.splits == "val"),
        "test": by_class(prepared.splits == "test"),
    }


def mistakes(evidence: Mapping[str, Any], prepared: Prepared, shipped: str) -> dict[str, Any]:
    """The confusion matrix of the exported student, its most frequent pairs and its surest mistakes."""
    own = evidence["models"][shipped]
    classes, origins = prepared.classes, prepared.origins()
    matrix, names = confusion(own["confusion"], classes)
    wrong = [entry for entry in own["confusion"] if entry[0] != entry[1]]
    pairs = sorted(wrong, key=lambda entry: -entry[2])[:PAIRS]
    return {
        "model": shipped,
        "split": evidence["split"],
        "names": names,
        "matrix": matrix,
        "gathered": len(classes) - CLASSES + 1 if len(classes) > CLASSES else 0,
        "total": sum(entry[2] for entry in own["confusion"]),
        "wrong": sum(entry[2] for entry in wrong),
        "pairs": [(classes[true], classes[predicted], n) for true, predicted, n in pairs],
        "surest": [
            {
                **m,
                "image": uri(_pixels(prepared, m["row"])),
                "label": classes[m["label"]],
                "predicted": classes[m["predicted"]],
                "origin": origins[m["row"]],
            }
            for m in own["mistakes"]
        ],
    }


def confusion(
    entries: Sequence[Sequence[int]], classes: Sequence[str]
) -> tuple[list[list[int]], list[str]]:
    """[true, predicted, count] entries -> a dense matrix, rows true, and the names of its rows and columns.

    Above CLASSES classes, the ones with most mistakes; the rest are gathered in a last one.
    """
    names, index = list(classes), {i: i for i in range(len(classes))}
    if len(classes) > CLASSES:
        bad = [0] * len(classes)
        for true, predicted, n in entries:
            bad[true] += n * (true != predicted)
        worst = sorted(sorted(range(len(classes)), key=lambda c: -bad[c])[: CLASSES - 1])
        index = {c: worst.index(c) if c in worst else len(worst) for c in range(len(classes))}
        names = [classes[c] for c in worst] + [OTHER]
    matrix = [[0] * len(names) for _ in names]
    for true, predicted, n in entries:
        matrix[index[true]][index[predicted]] += n
    return matrix, names


def attention(
    evidence: Mapping[str, Any], prepared: Prepared, shipped: str
) -> dict[str, Any] | None:
    """Test images beside the attention their patches receive in teacher and student; None without projectors.

    `top` ends the colour scale, in times uniform: the 99th percentile, at least 2: uniform is never bright.
    """
    block = evidence["attention"]
    received = {n: np.asarray(maps) for n, maps in block["received"].items()}
    students = [name for name in received if name != "teacher"]
    if not students:
        return None
    student = shipped if shipped in students else students[-1]
    compared = {name: received[name] for name in ("teacher", student)}
    top = max(2.0, *(float(np.quantile(maps, 0.99)) for maps in compared.values()))
    images = []
    for i, row in enumerate(block["rows"]):
        pixels = prepared.images.squares([row])[0]
        heat = {n: uri(heated(pixels, maps[i], block["grid"], top)) for n, maps in compared.items()}
        name = prepared.classes[prepared.labels[row]]
        images.append({"name": name, "image": uri(pixels), "heat": heat})
    ramp = np.linspace(0, 1, 64)[None].repeat(4, axis=0)
    return {"student": student, "top": top, "bar": uri(_colours(ramp)), "images": images}


def heated(
    pixels: Pixels, received: NDArray[np.float64], grid: Sequence[int], top: float
) -> Pixels:
    """pixels (S, S, 3) in grey under a heat map (N,) of patches, from 0 (dark) to `top` (bright)."""
    size = pixels.shape[0] * max(1, -(-96 // pixels.shape[0]))
    grey = np.asarray(Image.fromarray(pixels).convert("L").resize((size, size)))[..., None]
    heat = Image.fromarray(_colours(received.reshape(grid) / top))
    mixed = 0.3 * grey + 0.7 * np.asarray(heat.resize((size, size), Image.Resampling.BICUBIC))
    blended: Pixels = mixed.clip(0, 255).astype(np.uint8)
    return blended


def _colours(shares: NDArray[np.float64]) -> Pixels:
    """(h, w) from 0 to 1 -> (h, w, 3) of a colour map whose lightness rises evenly."""
    from matplotlib import colormaps

    coloured: Pixels = colormaps["inferno"](shares.clip(0, 1), bytes=True)[..., :3]
    return coloured
