"""Any classification data set of torchvision, by its class name: `torchvision:Flowers102`.

torchvision downloads, checks and lists; the images then go the same way as all others. CIFAR is only
downloaded by it: its own reader would unpickle the archives, ours (`cifar`) executes nothing.
"""

from __future__ import annotations

import inspect
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from pipeline.core.errors import UserError, nearest
from pipeline.prepare.sources import cifar
from pipeline.prepare.sources.sample import Columns, Sample, SourceImages
from pipeline.prepare.sources.splits import roles

PREFIX = "torchvision:"
ARCHIVES = ("CIFAR10", "CIFAR100")
SPLIT_NAMES = (("train", "trainval"), ("val", "valid"), ("test",))
LABELS = ("targets", "labels", "_labels", "y")  # attributes of torchvision's classes


def read(name: str, path: str | None, columns: Columns) -> SourceImages:
    """The data set `torchvision.datasets.<name>` under `path`, downloaded where it is not there yet.

    Raises UserError: unknown name, no path, no network, not a data set of images with one class each.
    """
    kind = _class_of(name)
    if path is None:
        raise UserError(
            f"prepare.path: got {path} for source '{PREFIX}{name}'; expected the folder to download to, or that "
            "holds it already; set it (data/downloads)"
        )
    if name in ARCHIVES:
        return _archive(kind, Path(path), columns)
    columns.only(PREFIX + name)
    datasets = _splits(name, kind, Path(path))
    ours = roles(datasets)
    classes = _class_names(name, datasets)
    samples = [
        Sample(f"{split}/{i:06d}", partial(_image, dataset, i), label, ours[split])
        for split, dataset in datasets.items()
        for i, label in enumerate(_labels(name, dataset, len(classes)))
    ]
    return SourceImages(classes, samples)


def _class_of(name: str) -> Any:
    try:
        from torchvision import datasets
    except ImportError as error:
        raise UserError(
            f"source '{PREFIX}{name}' needs torchvision ({error}); pip install torchvision"
        ) from None
    if name not in datasets.__all__:
        raise UserError(f"prepare.source: got {PREFIX + name!r}; {nearest(name, datasets.__all__)}")
    return getattr(datasets, name)


def _archive(kind: Any, root: Path, columns: Columns) -> SourceImages:
    from torchvision.datasets.utils import download_url

    if not (root / kind.base_folder).is_dir():
        try:
            download_url(kind.url, root, kind.filename, kind.tgz_md5)
        except (OSError, RuntimeError) as error:
            raise _not_available(kind.__name__, root, error) from None
        return cifar.read(str(root / kind.filename), columns)
    return cifar.read(str(root / kind.base_folder), columns)


def _not_available(name: str, root: Path, error: Exception) -> UserError:
    return UserError(
        f"{PREFIX}{name}: no files in {root}, and the download failed ({error}); check the network, or put the "
        "files there by hand"
    )


def _splits(name: str, kind: Any, root: Path) -> dict[str, Any]:
    """torchvision's name of each split that the data set has -> the data set; all of it is `train` without one."""
    accepts = inspect.signature(kind).parameters
    if "train" in accepts:
        return {s: _open(name, kind, root, train=s == "train") for s in ("train", "test")}
    if "split" not in accepts:
        return {"train": _open(name, kind, root)}
    datasets: dict[str, Any] = {}
    for names in SPLIT_NAMES:
        for split in names:
            try:
                dataset = _open(name, kind, root, split=split)
            except ValueError:  # torchvision's answer to a split that it does not have
                continue
            datasets[names[0]] = dataset
            break
    if "train" not in datasets:
        raise UserError(
            f"prepare.source: {PREFIX}{name}: got the splits {', '.join(datasets) or 'none'}; expected train; "
            "save it as class folders and use source: imagefolder"
        )
    return datasets


def _open(name: str, kind: Any, root: Path, **split: Any) -> Any:
    accepts = inspect.signature(kind).parameters
    arguments = dict(split)
    if "root" in accepts:
        arguments["root"] = str(root)
    if "download" in accepts:
        arguments["download"] = True
    try:
        return kind(**arguments)
    except TypeError as error:
        raise UserError(
            f"prepare.source: {PREFIX}{name}: got {error}; expected a data set that needs a folder only; save it "
            "as class folders and use source: imagefolder"
        ) from None
    except (OSError, RuntimeError, ImportError) as error:
        raise _not_available(name, root, error) from None


def _class_names(name: str, datasets: dict[str, Any]) -> list[str]:
    """The data set's own class names, else the numbers up to the largest label."""
    names = getattr(datasets["train"], "classes", None)
    if names:
        return [c if isinstance(c, str) else ", ".join(c) for c in names]
    labels = [label for dataset in datasets.values() for label in _labels(name, dataset, None)]
    return [str(i) for i in range(max(labels, default=-1) + 1)]


def _labels(name: str, dataset: Any, n_classes: int | None) -> list[int]:
    """Every label, from the data set's list, else from each item. Raises UserError: no class numbers."""
    lists = (getattr(dataset, attribute, None) for attribute in LABELS)
    listed = next((k for k in lists if k is not None and len(k) == len(dataset)), None)
    values = listed if listed is not None else [dataset[i][1] for i in range(len(dataset))]
    labels = []
    for i, label in enumerate(values):
        number = (
            label.item() if hasattr(label, "item") and getattr(label, "ndim", 1) == 0 else label
        )
        if not isinstance(number, int) or not 0 <= number < (n_classes or number + 1):
            raise UserError(
                f"prepare.source: {PREFIX}{name}: label {i}: got {label!r}; expected one class number an image, "
                f"0 to {(n_classes or 1) - 1}; choose a classification data set"
            )
        labels.append(number)
    return labels


def _image(dataset: Any, i: int) -> Image.Image:
    image = dataset[i][0]
    if not isinstance(image, Image.Image):
        raise ValueError(f"item {i}: got a {type(image).__name__}; expected an image")
    return image
