"""Datasets as (id, image, label): the sources, the split, the prepared folder. Torch-free.

A prepared folder holds `images.npy` (N, S, S, 3) uint8 RGB and `index.json` with a record per image.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from pipeline import files
from pipeline.errors import UserError, nearest

SCHEMA = "cakd.prepared/1"
SPLITS = ("train", "val", "test")
UNLABELLED = -1
SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}


@dataclass(frozen=True)
class Prepare:
    """`prepare:` which images, at what size, and how many labels the student may see."""

    source: str
    path: str | None = None  # the folder of `imagefolder`
    image_size: int = 224  # pixels, square
    student_labels: int | str = "all"  # "all", or N labels a class
    val: float = 0.1  # images held out for gates and calibration: a share below 1, a count from 1
    test: float = 0.2  # the same for the test split, where the source brings none
    seed: int = 0

    def __post_init__(self) -> None:
        if self.source not in SOURCES:
            raise ValueError(f"source is {self.source!r}; {nearest(self.source, SOURCES)}")
        if self.student_labels != "all" and not (
            isinstance(self.student_labels, int) and self.student_labels > 0
        ):
            raise ValueError(
                f"student_labels is {self.student_labels!r}; allowed: all, or N >= 1 a class"
            )
        if self.image_size < 8:
            raise ValueError(f"image_size is {self.image_size}; allowed: 8 pixels or more")
        for name, share in (("val", self.val), ("test", self.test)):
            if share <= 0:
                raise ValueError(f"{name} is {share}; allowed: a share below 1 or a count from 1")


@dataclass(frozen=True)
class Sample:
    """One image of a source before it is prepared. `label` None: unlabelled; `split` None: not decided."""

    id: str
    read: Callable[[], Image.Image]
    label: int | None
    split: str | None


def digits(_: Prepare) -> tuple[list[str], list[Sample]]:
    """scikit-learn's 1,797 handwritten digits (8x8, 0..16), the offline default."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = (bunch.images * (255 / 16)).round().astype(np.uint8)
    samples = [
        Sample(f"digits/{i:04d}", lambda a=a: Image.fromarray(a), int(label), None)  # type: ignore[misc]
        for i, (a, label) in enumerate(zip(pixels, bunch.target))
    ]
    return [str(c) for c in range(10)], samples


def imagefolder(config: Prepare) -> tuple[list[str], list[Sample]]:
    """Class folders under train/ and val/ or test/, or one tree of class folders; `unlabelled/` beside them.

    With train/ and val/ only, val/ is the test split, as the field reports it, and val is cut from train.
    Raises UserError: no path, no folder, no class, a class with no image, classes that differ between splits.
    """
    if config.path is None:
        raise UserError(
            f"prepare.path: got {config.path}; source 'imagefolder' needs the folder of your images"
        )
    root = Path(config.path)
    if not root.is_dir():
        raise UserError(
            f"prepare.path: {root} is not a folder; give the folder that holds train/ or the classes"
        )
    trees: dict[str | None, Path] = {s: root / s for s in SPLITS if (root / s).is_dir()}
    if "train" not in trees:
        if trees:
            raise UserError(f"{root}: has {', '.join(map(str, trees))}/ but no train/; add train/")
        trees = {None: root}
    elif set(trees) == {"train", "val"}:
        trees["test"] = trees.pop("val")
    labelled = {split: _class_folders(folder) for split, folder in trees.items()}
    classes = sorted(labelled["train" if "train" in labelled else None])
    if len(classes) < 2:
        raise UserError(
            f"{trees.get('train', root)}: found {len(classes)} class folders; at least 2 are needed"
        )
    samples: list[Sample] = []
    for split, folders in labelled.items():
        unknown = sorted(set(folders) - set(classes))
        if unknown:
            raise UserError(
                f"{trees[split]}: class {unknown[0]!r} is not in train/; {nearest(unknown[0], classes)}"
            )
        for name in sorted(folders):
            found = _image_files(folders[name])
            if not found:
                raise UserError(
                    f"{folders[name]}: class {name!r} holds no image; add images or remove the folder"
                )
            samples += [
                _file_sample(
                    root, p, classes.index(name), None if split in (None, "train") else split
                )
                for p in found
            ]
    samples += [_file_sample(root, p, None, "train") for p in _image_files(root / "unlabelled")]
    return classes, samples


def _class_folders(tree: Path) -> dict[str, Path]:
    return {
        p.name: p
        for p in tree.iterdir()
        if p.is_dir() and p.name != "unlabelled" and p.name[0] != "."
    }


def _image_files(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and p.is_file())


def _file_sample(root: Path, path: Path, label: int | None, split: str | None) -> Sample:
    return Sample(path.relative_to(root).as_posix(), lambda: _open(path), label, split)


def _open(path: Path) -> Image.Image:
    try:
        image = Image.open(path)
        image.load()
    except (
        OSError,
        UnidentifiedImageError,
        Image.DecompressionBombError,
        SyntaxError,
        ValueError,
    ) as error:
        raise UserError(f"{path}: not a readable image ({error}); repair or remove it") from None
    return image


SOURCES: dict[str, Callable[[Prepare], tuple[list[str], list[Sample]]]] = {
    "digits": digits,
    "imagefolder": imagefolder,
}


def square_rgb(image: Image.Image, size: int) -> NDArray[np.uint8]:
    """Any PIL image -> (size, size, 3) uint8 RGB: EXIF rotation applied, alpha on white, 16 bit scaled to 8;

    shorter side resized (bicubic, antialiased), centre crop.
    """
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        image = Image.fromarray((np.asarray(image).clip(0, 65535) / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return np.asarray(ImageOps.fit(image.convert("RGB"), (size, size), Image.Resampling.BICUBIC))


def prepare(config: Prepare, out: Path) -> dict[str, Any]:
    """Run a source, split it, write the prepared folder atomically; returns the index without its records.

    Raises UserError: everything a source raises, a split larger than the data, too few labels a class.
    """
    classes, samples = SOURCES[config.source](config)
    splits = _assign_splits(samples, config)
    shown = _choose_student_labels(samples, splits, classes, config)
    records: list[dict[str, Any]] = []
    with files.atomic_dir(out) as folder:
        shape = (len(samples), config.image_size, config.image_size, 3)
        images = np.lib.format.open_memmap(
            folder / "images.npy", mode="w+", dtype=np.uint8, shape=shape
        )
        for row, sample in enumerate(samples):
            images[row] = square_rgb(sample.read(), config.image_size)
            records.append(
                {
                    "id": sample.id,
                    "label": UNLABELLED if sample.label is None else sample.label,
                    "split": splits[row],
                    "student_label": row in shown,
                    "sha256": hashlib.sha256(images[row].tobytes()).hexdigest(),
                }
            )
        images.flush()
        counts = {s: sum(r["split"] == s for r in records) for s in SPLITS}
        header = {
            "schema": SCHEMA,
            "source": config.source,
            "classes": classes,
            "image_size": config.image_size,
            "counts": counts,
            "student_labels": len(shown),
            "labelled_train": sum(r["split"] == "train" and r["label"] >= 0 for r in records),
            "images_sha256": files.sha256(folder / "images.npy"),
            "provenance": files.provenance(config.__dict__),
        }
        files.write_json(folder / "index.json", {**header, "records": records})
    return header


def _assign_splits(samples: Sequence[Sample], config: Prepare) -> list[str]:
    """Keep the splits a source brings; cut the missing ones from the rest, stratified and seeded."""
    from sklearn.model_selection import train_test_split

    splits = [s.split for s in samples]
    for name, share in (("test", config.test), ("val", config.val)):
        if name in splits:
            continue
        free = [i for i, s in enumerate(splits) if s is None]
        labels = [samples[i].label for i in free]
        size: float | int = share if share < 1 else int(share)
        try:
            _, held_out = train_test_split(
                free, test_size=size, stratify=labels, random_state=config.seed
            )
        except ValueError as error:
            raise UserError(
                f"prepare.{name}: cannot cut {size} of {len(free)} images, stratified: {error}"
            ) from None
        for i in held_out:
            splits[i] = name
    return [s or "train" for s in splits]


def _choose_student_labels(
    samples: Sequence[Sample], splits: Sequence[str], classes: Sequence[str], config: Prepare
) -> set[int]:
    """Rows of train whose label the student may see: all labelled ones, or N a class drawn by the seed."""
    chosen: set[int] = set()
    for label, name in enumerate(classes):
        rows = [i for i, s in enumerate(samples) if splits[i] == "train" and s.label == label]
        if isinstance(config.student_labels, int):
            if len(rows) < config.student_labels:
                raise UserError(
                    f"prepare.student_labels: got {config.student_labels}, but class {name!r} has only "
                    f"{len(rows)} training images; lower it or use 'all'"
                )
            generator = np.random.default_rng((config.seed, label))
            rows = [int(i) for i in generator.choice(rows, config.student_labels, replace=False)]
        chosen.update(rows)
    return chosen


@dataclass(frozen=True)
class Prepared:
    """A prepared folder, opened. images (N, S, S, 3) uint8 memory-mapped; labels (N,) with -1 unlabelled."""

    folder: Path
    images: NDArray[np.uint8]
    ids: tuple[str, ...]
    labels: NDArray[np.int64]
    splits: NDArray[np.str_]
    student_label: NDArray[np.bool_]
    classes: tuple[str, ...]
    image_size: int
    images_sha256: str  # of the pixels
    index_sha256: str  # of the index: ids, labels, splits, which labels the student may see

    @classmethod
    def open(cls, folder: Path | str, check: bool = True) -> Prepared:
        """Open and, with `check`, verify the pixels against the index. Raises UserError: missing, damaged."""
        folder = Path(folder)
        index = files.read_json(folder / "index.json", SCHEMA)
        path = folder / "images.npy"
        if check and (not path.is_file() or files.sha256(path) != index["images_sha256"]):
            raise UserError(
                f"{path}: missing, or not the pixels of index.json; run prepare again (`dvc repro prepare`)"
            )
        records = index["records"]
        return cls(
            folder=folder,
            images=np.load(path, mmap_mode="r", allow_pickle=False),
            ids=tuple(r["id"] for r in records),
            labels=np.array([r["label"] for r in records], dtype=np.int64),
            splits=np.array([r["split"] for r in records]),
            student_label=np.array([r["student_label"] for r in records], dtype=bool),
            classes=tuple(index["classes"]),
            image_size=index["image_size"],
            images_sha256=index["images_sha256"],
            index_sha256=files.sha256(folder / "index.json"),
        )

    def made_of(self) -> dict[str, str]:
        """The hashes that tell this data set from any other: for provenance and fingerprints."""
        return {"images": self.images_sha256, "index": self.index_sha256}

    def rows(self, split: str) -> NDArray[np.int64]:
        """Row numbers of one split, in index order."""
        return np.flatnonzero(self.splits == split)


def permutation(n: int, seed: int, stream: str, epoch: int) -> NDArray[np.int64]:
    """The order of `n` items in one pass of a named stream: a function of its arguments alone."""
    key = hashlib.blake2b(f"{seed}/{stream}/{epoch}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(key, "little")).permutation(n)


def spread(rows: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """At most `count` rows, evenly spaced: the index of an image folder is in class order."""
    if len(rows) <= count:
        return rows
    chosen: NDArray[np.int64] = rows[np.linspace(0, len(rows) - 1, count).round().astype(int)]
    return chosen


def normalised(images: NDArray[np.uint8], preprocess: dict[str, Any]) -> NDArray[np.float32]:
    """uint8 (B, S, S, 3) -> float32 (B, 3, S, S): /255, minus mean, over std; the same arithmetic everywhere."""
    x = images.astype(np.float32) / np.float32(255)
    x = (x - np.float32(preprocess["mean"])) / np.float32(preprocess["std"])
    return np.ascontiguousarray(x.transpose(0, 3, 1, 2))


def read_folder(folder: Path, size: int, limit: int | None = None) -> Iterable[NDArray[np.uint8]]:
    """The images of any folder (or of a prepared one, its val split) as (size, size, 3) uint8, in name order."""
    if (folder / "index.json").is_file():
        prepared = Prepared.open(folder)
        for row in prepared.rows("val")[:limit]:
            yield square_rgb(Image.fromarray(prepared.images[row]), size)
        return
    found = _image_files(folder)
    if not found:
        raise UserError(f"{folder}: no images found; allowed: {', '.join(sorted(SUFFIXES))}")
    for path in found[:limit]:
        yield square_rgb(_open(path), size)
