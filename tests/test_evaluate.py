"""The figures of the evaluation against their definitions, and a noise that is disjoint and seeded."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from pipeline.distill.kernels.reference import attention, heads
from pipeline.distill.methods import cakd
from pipeline.evaluate import accuracy, corruptions, evaluate
from pipeline.models import checkpoint, teacher
from pipeline.models.student import Taps
from tests.test_training import QUICK, run


def test_figures_are_their_definitions():
    logits = torch.tensor([[9.0, 1, 0, 0, 0, 0], [0, 2, 1, 0, 0, 0], [5, 4, 3, 2, 1, 0.0]])
    labels = torch.tensor([0, 2, 5])
    found = accuracy.figures(logits, labels, bins=10)
    assert found["top1"] == pytest.approx(1 / 3) and found["top5"] == pytest.approx(2 / 3)
    assert found["nll"] == pytest.approx(F.cross_entropy(logits, labels).item())
    assert found["n"] == 3


def test_ece_of_a_calibrated_coin_is_zero_and_of_a_boaster_one():
    half = torch.zeros(100, 2)
    labels = torch.tensor([0, 1] * 50)
    assert accuracy.figures(half + torch.tensor([1e-6, 0]), labels, 15)["ece"] == pytest.approx(
        0, abs=1e-4
    )
    sure = torch.tensor([[50.0, 0.0]]).repeat(100, 1)
    assert accuracy.figures(sure, torch.ones(100, dtype=torch.long), 15)["ece"] == pytest.approx(1)


@pytest.mark.parametrize("kind", corruptions.NOISE)
def test_noise_changes_the_image_and_is_a_function_of_seed_and_id(kind, prepared):
    images = prepared.images.squares(range(4))
    a = corruptions.noisy(images, ("a", "b", "c", "d"), kind, 0)
    b = corruptions.noisy(images[::-1], ("d", "c", "b", "a"), kind, 0)[::-1]
    other = corruptions.noisy(images, ("a", "b", "c", "d"), kind, 1)
    assert a.shape == images.shape and a.dtype == np.uint8
    assert np.array_equal(a, b) and not np.array_equal(a, other)
    assert all((x != y).any() for x, y in zip(a, images, strict=True))


def test_models_are_judged_clean_and_noisy_with_what_they_saw(
    prepared, teacher_path, features, tmp_path
):
    for method in ("plain", "cakd"):
        run(QUICK, method, prepared, teacher_path, features, tmp_path)
    students = [tmp_path / m / "student.safetensors" for m in ("plain", "cakd")]
    found, _ = evaluate.evaluate(accuracy.Evaluate(), prepared, teacher_path, students)
    assert list(found["models"]) == ["teacher", "plain", "cakd"]
    for judged in found["models"].values():
        assert judged["clean"]["n"] == 400 and judged["noisy"]["n"] == 2000
        kinds = [k["top1"] for k in judged["noisy_by_kind"].values()]
        assert judged["noisy"]["top1"] == pytest.approx(np.mean(kinds), abs=1e-6)
    top1 = {name: judged["clean"]["top1"] for name, judged in found["models"].items()}
    for name in ("teacher", "cakd"):
        (compared,) = found["models"][name]["against"].values()
        assert compared["points"] == pytest.approx(100 * (top1[name] - top1["plain"]), abs=1e-3)
        assert compared["better"] - compared["worse"] == round(4 * compared["points"])
        assert compared["low"] < compared["points"] < compared["high"]
    assert found["models"]["plain"]["against"] == {}
    assert found["models"]["teacher"]["labels_seen"] == 1297
    assert found["models"]["cakd"]["labels_seen"] == 50
    assert found["models"]["teacher"]["params"] > 0 and found["models"]["plain"]["macs"] > 0
    assert set(found["models"]["cakd"]["cosine"]) == {"attention", "tokens"}
    assert "cosine" not in found["models"]["plain"]
    assert all(-1 <= c <= 1 for c in found["models"]["cakd"]["cosine"].values())


def test_similarity_is_one_where_the_student_projects_the_teachers_own(
    prepared, teacher_path, features, tmp_path, monkeypatch
):
    run(QUICK, "cakd", prepared, teacher_path, features, tmp_path)
    live = teacher.load(teacher_path)
    shown: list[torch.Tensor] = []
    whole = evaluate.views.whole

    def keep(images):
        shown.append(whole(images))
        return shown[-1]

    def projected(self, feature):
        tokens = live(shown[-1])
        return attention(*heads(tokens.qkv)), tokens.h

    monkeypatch.setattr(evaluate.views, "whole", keep)
    monkeypatch.setattr(cakd.Projectors, "projected", projected)
    student, description = checkpoint.load(tmp_path / "cakd" / "student.safetensors")
    projectors = cakd.load_projectors(tmp_path / "cakd", description)
    with Taps(student, [projectors.tap.module]) as taps:
        through = evaluate.Projected(student, description["preprocess"], projectors, taps)
        found = evaluate.similarity(through, live, prepared, accuracy.Evaluate())
    assert found == {"attention": pytest.approx(1, abs=1e-5), "tokens": pytest.approx(1, abs=1e-5)}
