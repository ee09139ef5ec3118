"""The recipe that is chosen for somebody's images where none was named, and what the choice rests on."""

from __future__ import annotations

import shutil
from argparse import Namespace
from pathlib import Path

import pytest

from pipeline.core import config
from pipeline.core.errors import UserError
from pipeline.prepare.survey import Survey, source_of, survey
from pipeline.project import choosing
from pipeline.project.choosing import Budget
from pipeline.project.rehearsal import Costs, Sizes, rehearse
from stages import check
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
    choice = choosing.choose(Survey("parquet", images, labelled, classes, side, 0.0, ()), gpu)
    assert choice.recipe == recipe
    assert f"{images:,} images of {classes} classes, {side} px" in choice.reason
    assert ("a GPU" if gpu else "no GPU") in choice.reason
    assert choice.values["prepare"]["source"] == "parquet"


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
    surveyed = survey(folder_of(tmp_path / "own", unlabelled=5))
    assert (surveyed.source, surveyed.images, surveyed.labelled, surveyed.side) == (
        "imagefolder",
        53,
        48,
        32,
    )
    assert surveyed.classes == len(list((tmp_path / "own" / "train").iterdir()))


def test_a_folder_of_parquet_is_read_as_such(tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    containers.as_parquet(tmp_path, {"train": containers.pictures(12, 0)})
    assert source_of(tmp_path) == "parquet" and survey(tmp_path).images == 12
    assert source_of(tmp_path / "cifar-10-python.tar.gz") == "cifar"


COSTS = Costs(image=0.001, teacher_image=0.002, view=0.001, step=0.5, test_image=0.02)
PLAN = Budget(passes=60, views=8, steps=600)


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """No GPU, and known costs instead of a rehearsal; the times of reading that it was asked with."""
    asked_with: list[float] = []

    def costs(_: object, reading: float) -> Costs:
        asked_with.append(reading)
        return COSTS

    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(check, "rehearse", costs)
    return asked_with


def test_the_length_of_a_run_is_the_sum_of_its_stages() -> None:
    images = Sizes(images=1000, train=600, labelled=300, test=200)
    stages = COSTS.minutes(images, passes=60, views=8, steps=600)
    seconds = {"prepare": 1, "teach": 36, "cache": 4.8, "distill": 300, "evaluate": 4}
    assert stages == pytest.approx({stage: value / 60 for stage, value in seconds.items()})
    total = choosing.minutes(COSTS, images, PLAN)
    assert total == pytest.approx(choosing.OTHER_MINUTES + sum(seconds.values()) / 60)
    assert choosing.duration(COSTS, images, PLAN).startswith(
        "11 min (prepare under a minute, teach "
    )


def test_a_run_within_the_limit_is_not_cut_and_a_longer_one_to_just_below_it() -> None:
    small, large = Sizes(1000, 600, 600, 200), Sizes(60_000, 40_000, 40_000, 10_000)
    assert choosing.within(55, COSTS, small, PLAN) == PLAN
    cut = choosing.within(55, COSTS, large, PLAN)
    assert choosing.minutes(COSTS, large, PLAN) > 55 >= choosing.minutes(COSTS, large, cut) > 50
    assert all(vars(cut)[name] < value for name, value in vars(PLAN).items())


def test_where_no_budget_fits_the_least_one_is_taken_and_none_is_raised() -> None:
    endless = Sizes(*[10_000_000] * 4)
    assert vars(choosing.within(55, COSTS, endless, PLAN)) == choosing.LEAST
    few = Budget(passes=1, views=1, steps=100)
    assert choosing.within(55, COSTS, endless, few) == few


@pytest.mark.parametrize(("labelled", "passes"), [(5000, 60), (640, 126), (40, 400)])
def test_a_teacher_from_scratch_makes_more_passes_over_few_images(
    labelled: int, passes: int
) -> None:
    params = config.read(ROOT / "params.yaml")
    images = Sizes(labelled, labelled, labelled, 0)
    assert choosing.budget(params, images).passes == passes
    params["teach"]["weights"] = "pretrained"
    assert choosing.budget(params, images).passes == 60


def test_images_are_counted_as_prepare_splits_them(tmp_path: Path) -> None:
    surveyed = survey(folder_of(tmp_path / "own", unlabelled=5))
    params = config.read(ROOT / "params.yaml")
    params["prepare"] |= {"source": "imagefolder", "path": str(tmp_path / "own"), "val": 10}
    counted = choosing.sizes(surveyed, params)
    assert (counted.images, counted.test, counted.train) == (53, 8, 35)
    assert 30 <= counted.labelled <= 35


@pytest.mark.ci
def test_a_rehearsal_times_every_stage_of_the_real_ones(capsys: pytest.CaptureFixture[str]) -> None:
    params = config.read(ROOT / "params.yaml")
    params["distill"]["methods"] = ["plain", "cakd"]
    costs = rehearse(params, reading=5.0)
    assert 5 < costs.image < 5.5
    assert all(1e-6 < value < 1 for name, value in vars(costs).items() if name != "image")
    assert capsys.readouterr().out == ""


def asked(params: Path, data: Path | None, force: bool = False) -> Namespace:
    given = {"recipe": None, "recipes": ROOT / "recipes", "data": data and str(data)}
    return Namespace(**given, params=params, force=force, out=None)


def test_data_alone_writes_the_chosen_recipe_and_says_why(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: list[float]
) -> None:
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
    assert said[2].startswith("here it takes about ") and "measured now (load " in said[2]
    assert "36 labelled images are few" in said[3]
    assert "cut so that" in said[4] and "distill.steps 6500 to " in said[4]
    assert len(quick) == 1 and quick[0] > 0
    before = params.read_bytes()
    main(asked(params, data))  # again: what was chosen stays, whatever the machine does now
    assert "kept" in capsys.readouterr().out and params.read_bytes() == before and len(quick) == 1
    main(asked(params, data, force=True))
    assert "recipe few-labels" in capsys.readouterr().out and len(quick) == 2


def test_other_images_and_edits_are_chosen_for_anew_or_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], quick: list[float]
) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    one, other = folder_of(tmp_path / "one"), folder_of(tmp_path / "other")
    main(asked(params, one))
    main(asked(params, other))
    assert len(quick) == 2 and config.read(params)["prepare"]["path"] == str(other)
    params.write_text(params.read_text(encoding="utf-8").replace("lr: 0.001", "lr: 0.003", 1))
    with pytest.raises(UserError, match="edits by hand"):
        main(asked(params, other))


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
    with pytest.raises(UserError, match="2 of 2 images that were opened cannot be read"):
        main(asked(params, tmp_path / "broken"))
    assert params.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_a_table_or_a_wrong_path_is_told_what_is_expected(
    tmp_path: Path, quick: list[float]
) -> None:
    params = tmp_path / "params.yaml"
    shutil.copy(ROOT / "params.yaml", params)
    table = tmp_path / "own" / "labels.csv"
    with pytest.raises(UserError, match=f"got a table; expected the folder .*DATA={table.parent}"):
        main(asked(params, table))
    with pytest.raises(
        UserError, match="no such file or folder; expected the folder that holds train"
    ):
        main(asked(params, tmp_path / "nosuch"))
    given = asked(params, folder_of(tmp_path / "own"))
    given.recipe = "students"
    with pytest.raises(UserError, match="which its source 'digits' does not read"):
        main(given)
    assert not quick and params.read_bytes() == (ROOT / "params.yaml").read_bytes()


def test_edits_by_hand_are_refused_before_anything_is_timed(
    tmp_path: Path, quick: list[float]
) -> None:
    params = tmp_path / "params.yaml"
    text = (ROOT / "params.yaml").read_text(encoding="utf-8")
    params.write_text(text.replace("lr: 0.002", "lr: 0.003", 1), encoding="utf-8")
    with pytest.raises(UserError, match="to run them, `make repro` without RECIPE and DATA"):
        main(asked(params, folder_of(tmp_path / "own")))
    assert not quick
