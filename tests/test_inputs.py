"""The pictures of checks and calibrations: spread over a folder's classes, with the labels its names give."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from exporters.artifact import inputs
from pipeline.core.errors import UserError

NOTES = {"image_size": "8", "mean": "0 0 0", "std": "1 1 1", "classes": "ant\nbee\ncat"}
SESSION = SimpleNamespace(metadata=NOTES, input_shape=(None, 3, 8, 8))


@pytest.fixture
def zoo(tmp_path: Path) -> Path:
    """Six pictures of each of ant, bee, dog, each class of one brightness; one picture outside."""
    for brightness, name in enumerate(("ant", "bee", "dog"), 1):
        (tmp_path / name).mkdir()
        for number in range(6):
            image = Image.new("RGB", (8, 8), (brightness * 50,) * 3)
            image.save(tmp_path / name / f"{number}.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "zero.png")
    return tmp_path


def test_labels_are_the_places_of_the_folders_names(zoo: Path) -> None:
    x, labels = inputs.labelled_images(zoo, SESSION, 100)  # type: ignore[arg-type]
    assert x.shape == (19, 3, 8, 8) and x.dtype == np.float32
    assert labels.tolist() == [0] * 6 + [1] * 6 + [-1] * 7


def test_fewer_than_all_are_spread_over_the_classes(zoo: Path) -> None:
    x, labels = inputs.labelled_images(zoo, SESSION, 4)  # type: ignore[arg-type]
    assert labels.tolist() == [0, 1, -1, -1]
    assert np.allclose(x[:, 0, 0, 0] * 255, [50, 100, 150, 0])


def test_a_prepared_folder_gives_its_val_split(digits: Path, prepared: object) -> None:
    names = "\n".join(prepared.classes)  # type: ignore[attr-defined]
    session = SimpleNamespace(metadata={**NOTES, "classes": names}, input_shape=(None, 3, 8, 8))
    _, labels = inputs.labelled_images(digits, session, 1000)  # type: ignore[arg-type]
    rows = prepared.rows("val")  # type: ignore[attr-defined]
    assert labels.tolist() == prepared.labels[rows].tolist()  # type: ignore[attr-defined]


def test_a_folder_without_images_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images found"):
        inputs.labelled_images(tmp_path, SESSION, 4)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="not a folder"):
        inputs.labelled_images(tmp_path / "lost", SESSION, 4)  # type: ignore[arg-type]
