"""The same small pictures as an image folder, as Hugging Face parquet and as the original CIFAR archives."""

from __future__ import annotations

import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

FINE = ["apple", "baby", "bear", "crab"]
COARSE = ["animal", "fruit", "person"]
COARSE_OF = [1, 2, 0, 0]


def pictures(n: int, seed: int) -> tuple[np.ndarray, list[int]]:
    """(n, 32, 32, 3) uint8 noise and n labels of FINE, all classes alike often, in a mixed order."""
    draw = np.random.default_rng(seed)
    pixels = draw.integers(0, 256, (n, 32, 32, 3), dtype=np.uint8)
    return pixels, draw.permutation(np.arange(n) % len(FINE)).tolist()


def as_folder(root: Path, splits: dict[str, tuple[np.ndarray, list[int]]]) -> None:
    """split/class/number.png"""
    for split, (pixels, labels) in splits.items():
        for i, (picture, label) in enumerate(zip(pixels, labels, strict=True)):
            path = root / split / FINE[label] / f"{i:03d}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(picture).save(path)


def as_parquet(
    root: Path, splits: dict[str, tuple[np.ndarray, list[int]]], shards: int = 2
) -> None:
    """split-0000k-of-0000n.parquet in the schema of the hub, PNG bytes, two columns of labels."""
    import pyarrow as pa
    from pyarrow import parquet

    root.mkdir(parents=True, exist_ok=True)
    names = {"fine_label": FINE, "coarse_label": COARSE}
    features = {n: {"names": v, "_type": "ClassLabel"} for n, v in names.items()}
    note = {"info": {"features": {"img": {"_type": "Image"}, **features}}}
    for split, (pixels, labels) in splits.items():
        for k, part in enumerate(np.array_split(np.arange(len(labels)), shards)):
            cells = [{"bytes": png(pixels[i]), "path": f"{i}.png"} for i in part]
            table = pa.table(
                {
                    "img": cells,
                    "fine_label": [labels[i] for i in part],
                    "coarse_label": [COARSE_OF[labels[i]] for i in part],
                }
            ).replace_schema_metadata({"huggingface": json.dumps(note)})
            name = f"{split}-{k:05d}-of-{shards:05d}.parquet"
            parquet.write_table(table, root / name, row_group_size=7)


def png(picture: np.ndarray) -> bytes:
    """Lossless bytes of a picture."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    return buffer.getvalue()


def as_cifar100(root: Path, splits: dict[str, tuple[np.ndarray, list[int]]]) -> Path:
    """cifar-100-python/{train,test,meta}, keys in bytes as Python 2 wrote them; the folder."""
    folder = root / "cifar-100-python"
    folder.mkdir(parents=True)
    for split, (pixels, labels) in splits.items():
        batch = {
            b"data": rows(pixels),
            b"fine_labels": labels,
            b"coarse_labels": [COARSE_OF[label] for label in labels],
            b"filenames": [f"{i}.png".encode() for i in range(len(labels))],
        }
        dump(folder / split, batch)
    dump(folder / "meta", {"fine_label_names": FINE, "coarse_label_names": COARSE})
    return folder


def as_cifar10(root: Path, splits: dict[str, tuple[np.ndarray, list[int]]]) -> Path:
    """cifar-10-batches-py/{data_batch_1..5,test_batch,batches.meta}; the folder."""
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    pixels, labels = splits["train"]
    parts = np.array_split(np.arange(len(labels)), 5)
    batches = {f"data_batch_{k + 1}": part for k, part in enumerate(parts)}
    for name, part in batches.items():
        dump(folder / name, {b"data": rows(pixels[part]), b"labels": [labels[i] for i in part]})
    pixels, labels = splits["test"]
    dump(folder / "test_batch", {b"data": rows(pixels), b"labels": labels})
    dump(folder / "batches.meta", {b"label_names": [n.encode() for n in FINE]})
    return folder


def rows(pixels: np.ndarray) -> np.ndarray:
    """(n, 32, 32, 3) -> (n, 3072): all red values, all green, all blue."""
    return np.ascontiguousarray(pixels.transpose(0, 3, 1, 2)).reshape(len(pixels), -1)


def dump(path: Path, value: object, protocol: int = 2) -> None:
    """Protocol 2, as the originals."""
    path.write_bytes(pickle.dumps(value, protocol=protocol))


def packed(folder: Path) -> Path:
    """The folder as a .tar.gz beside it."""
    path = folder.with_name(f"{folder.name}.tar.gz")
    with tarfile.open(path, "w:gz") as tar:
        tar.add(folder, arcname=folder.name)
    return path
