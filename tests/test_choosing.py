"""The recipe that is chosen for somebody's images where none was named, and what the choice rests on."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from pipeline.core import config
from pipeline.core.errors import UserError
from pipeline.prepare.survey import source_of, survey
from pipeline.project.choosing import choose
from stages.check import main
from tests import containers
from tests.house import ROOT


@pytest.mark.parametrize(
    ("images", "labelled", "classes", "side", "gpu", "recipe"),
    [
        (3000, 3000, 10, 500, True, "imagefolder"),
        (3000, 3000, 10, 500, False, "imagefolder-mini"),
        (5000, 500, 10, 32, True, "few-labels"),
        (900, 900, 10, 32, False, "few-labels"),  # 90 a class
        (5000, 5000, 10, 32, False, "imagefolder-mini"),
    ],
)
def test_size_labels_and_machine_decide(
    images: int, labelled: int, classes: int, side: int, gpu: bool, recipe: str
) -> None:
    choice = choose(images, labelled, classes, side, gpu)
    assert choice.recipe == recipe
    assert f"{images:,} images of {classes} classes, {side} px" in choice.reason
    assert ("a GPU" if gpu else "no GPU") in choice.reason


def folder_of(root: Path, unlabelled: int = 0) -> Path:
    """Class folders of 32 px, and images without a label beside them."""
    containers.as_folder(
        root, {"train": containers.pictures(40, 0), "test": containers.pictures(8, 1)}
    )
    (root / "unlabelled").mkdir()
    known = sorted((root / "train").rglob("*.png"))
    for i in range(unlabelled):
        shutil.copy(known[i % len(known)], root / "unlabelled" / f"{i}.png")
    return root


def test_a_survey_counts_images_labels_and_pixels(tmp_path: Path) -> None:
    found = survey(folder_of(tmp_path / "own", unlabelled=5))
    assert (found.source, found.images, found.labelled, found.side) == ("imagefolder", 53, 48, 32)
    assert found.classes == len(list((tmp_path / "own" / "train").iterdir()))


def test_a_folder_of_parquet_is_read_as_such(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    containers.as_parquet(tmp_path, {"train": containers.pictures(12, 0)})
    assert source_of(tmp_path) == "parquet" and survey(tmp_path).images == 12
    assert source_of(tmp_path / "cifar-10-python.tar.gz") == "cifar"


def asked(params: Path, data: Path | None, force: bool = False) -> Namespace:
    given = {"recipe": None, "recipes": ROOT / "recipes", "data": data and str(data)}
    return Namespace(**given, params=params, force=force, out=None)


def test_data_alone_writes_the_chosen_recipe_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    data = folder_of(tmp_path / "own")
    main(asked(params, data))
    said = capsys.readouterr().out.splitlines()
    assert (
        said[0].startswith(f"{data}: recipe few-labels, for 48 images") and "RECIPE=NAME" in said[0]
    )
    written = config.read(params)["prepare"]
    assert (written["source"], written["path"]) == ("imagefolder", str(data))
    assert written["student_labels"] == "all"
    main(asked(params, data))  # again: nothing to write
    assert "unchanged" in capsys.readouterr().out


def test_a_path_without_images_is_refused_in_a_line_and_nothing_is_written(tmp_path: Path) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    for path in (tmp_path / "none", tmp_path / "empty"):
        (tmp_path / "empty").mkdir(exist_ok=True)
        with pytest.raises(UserError):
            main(asked(params, path))
    for name in ("a", "b"):
        (tmp_path / "broken" / name).mkdir(parents=True)
        (tmp_path / "broken" / name / "x.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="none of 2 images can be read"):
        main(asked(params, tmp_path / "broken"))
    assert params.read_bytes() == (ROOT / "params.yaml").read_bytes()
