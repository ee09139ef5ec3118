"""Settings are chosen on val, by the same budget for every method, and stand beside the recipe."""

from __future__ import annotations

import argparse
import itertools
import shutil

import numpy as np
import pytest

from benchmarks import runs, tune
from pipeline.core import config
from pipeline.core.errors import UserError
from pipeline.data.pixels import Squares
from pipeline.data.prepared import Prepared
from pipeline.distill.settings import Distill
from pipeline.project import recipes
from stages.check import SECTIONS
from tests.conftest import ROOT
from tests.test_training import QUICK


@pytest.fixture
def search(prepared, teacher_path, features, tmp_path, monkeypatch):
    """`benchmarks.tune digits` on the small teacher's features, with few steps."""
    for name, target in (
        ("prepared", prepared.folder),
        ("teacher", teacher_path.parent),
        ("features", features),
    ):
        (tmp_path / name).symlink_to(target)
    folder = tmp_path / "recipes"
    shutil.copytree(ROOT / "recipes", folder, ignore=shutil.ignore_patterns("tuned"))
    monkeypatch.setattr(runs, "RECIPES", folder)
    monkeypatch.setattr(runs.Runs, "of", lambda _, params: runs.Runs(params, tmp_path))

    def search(*methods, trials=3, grid=()):
        args = argparse.Namespace(
            recipe="digits",
            data=None,
            set=["distill.steps=4"],
            methods=list(methods),
            trials=trials,
            grid=[[text] for text in grid],
            recipes=folder,
            out=tmp_path / "tune",
        )
        tune.main(args)
        return folder

    return search


def test_choosing_never_opens_the_test_split(search, prepared, monkeypatch):
    exact, images = Prepared.rows, []

    def rows(self, split):
        assert split != "test"
        return exact(self, split)

    class Watched(np.ndarray):
        def __getitem__(self, index):
            if isinstance(index, np.ndarray):
                images.append(np.asarray(index))
            return np.asarray(super().__getitem__(index))

    test = exact(prepared, "test")
    opened = Prepared.open

    def watched(folder):
        made = opened(folder)
        object.__setattr__(made, "images", Squares(made.images.array.view(Watched)))
        return made

    monkeypatch.setattr(Prepared, "rows", rows)
    monkeypatch.setattr(Prepared, "open", watched)
    search("plain", "logits")
    read = np.concatenate(images)
    assert np.isin(read, exact(prepared, "val")).any()
    assert not np.isin(read, test).any()


def test_choices_stand_beside_the_recipe_and_a_second_search_trains_nothing(
    search, tmp_path, monkeypatch
):
    folder = search("plain", "logits")
    choices = config.read(recipes.tuned_path("digits", folder))
    record = config.read(tmp_path / "tune.json")["methods"]
    for method in ("plain", "logits"):
        best = record[method]["trials"][record[method]["best"]]
        assert choices.get(method, {}) == best
        scores = record[method]["scores"]
        assert scores[record[method]["best"]]["top1"] == max(s["top1"] for s in scores)
    merged = recipes.merged("digits", folder, SECTIONS)
    assert merged["distill"]["tuned"] == choices
    settings = config.parse(Distill, merged["distill"], "distill")
    for method, choice in choices.items():
        for key, value in choice.items():
            place = settings.of_method(method)
            for name in key.split("."):
                place = getattr(place, name)
            assert place == value
    assert recipes.merged("cifar10-mini", folder, SECTIONS, "x")["distill"]["tuned"] == {}
    monkeypatch.setattr(runs.distill, "distill", None)
    search("plain", "logits")


def test_every_method_gets_the_same_number_of_trials_and_the_recipe_is_the_first():
    for method in ("plain", "plain+trans", "control", "logits", "cakd+logits", "rkd"):
        drawn = list(tune.trials(QUICK, method, 6))
        assert len(drawn) == 6 and drawn[0] == {}
        assert drawn == list(tune.trials(QUICK, method, 6))
        made = [QUICK.with_choice(choice, method) for choice in drawn]
        assert all(a != b for a, b in itertools.combinations(made, 2))  # so as many settings
        assert ("labelled_share" in drawn[1]) == (not method.startswith("plain"))
        assert ("cakd.gram_weight" in drawn[1]) == (method == "cakd+logits")


def test_a_grid_adds_every_combination_of_the_keys_that_a_method_reads(search, tmp_path):
    grid = {"lr": [QUICK.lr, 0.5], "labelled_share": [0.1], "logits.weight": [7.0]}
    assert [*tune.points(QUICK, "plain", grid)] == [{"lr": 0.5}]
    shared = [{"lr": lr, "labelled_share": 0.1} for lr in grid["lr"]]
    assert [*tune.points(QUICK, "rkd", grid)] == shared
    assert [*tune.points(QUICK, "gl+logits", grid)] == [c | {"logits.weight": 7.0} for c in shared]
    deep = {"cross_entropy.weight": [0.0], "cakd.trans.noise": [0.3], "terms.dkd.beta": [2.0]}
    assert [*tune.points(QUICK, "gl", deep)] == [
        {"cross_entropy.weight": 0.0, "cakd.trans.noise": 0.3}
    ]
    with pytest.raises(UserError, match="got key 'lrr'"):
        [*tune.points(QUICK, "plain", {"lrr": [1.0]})]
    search("plain", trials=1, grid=["lr=0.001,0.003", "weight_decay=0"])
    tried = config.read(tmp_path / "tune.json")["methods"]["plain"]["trials"]
    assert tried == [{}, {"lr": 0.001}, {"lr": 0.003}, {"weight_decay": 0}]
    assert (
        "--trials 1 --grid lr=0.001,0.003 --grid weight_decay=0"
        in (tmp_path / "tune.md").read_text()
    )


@pytest.mark.parametrize("text", ["lr", "lr=", "=3"])
def test_a_grid_without_key_or_values_is_refused(search, text):
    with pytest.raises(UserError, match=f"--grid: got '{text}'"):
        search("plain", grid=[text])


def test_equals_are_told_apart_by_their_likelihood():
    scores = [{"top1": 0.9, "nll": 0.5}, {"top1": 0.95, "nll": 0.4}, {"top1": 0.95, "nll": 0.3}]
    assert tune.best(scores) == 2


def test_a_tuned_key_that_is_none_is_refused_by_name():
    for key in ("logits.wait", "logits", "terms.none.weight", "lr.x", "lr.x.y", "student.t"):
        with pytest.raises(UserError, match=rf"distill.tuned.logits: got key '{key}'"):
            QUICK.with_choice({key: 1.0}, "logits")
    with pytest.raises(UserError, match="distill.tuned.logits.batch"):
        QUICK.with_choice({"batch": "many"}, "logits")
