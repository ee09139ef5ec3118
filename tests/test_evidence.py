"""The evidence is what the models say: counts, confidences and attention, computed again by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pipeline.data import views
from pipeline.evaluate import accuracy, evidence
from pipeline.evaluate.evaluate import evaluate
from pipeline.models import checkpoint, teacher
from tests.test_training import QUICK, run


@pytest.fixture(scope="module")
def students(prepared, teacher_path, features, tmp_path_factory):
    folder = tmp_path_factory.mktemp("students")
    for method in ("plain", "cakd"):
        run(QUICK, method, prepared, teacher_path, features, folder)
    return [folder / m / "student.safetensors" for m in ("plain", "cakd")]


@pytest.fixture(scope="module")
def judged(prepared, teacher_path, students):
    return evaluate(accuracy.Evaluate(), prepared, teacher_path, students)


@pytest.fixture(scope="module")
def found(judged):
    return judged[1]


def test_confusion_and_accuracy_are_of_the_same_answers(judged, found):
    figures = judged[0]["models"]
    assert list(found["models"]) == ["teacher", "plain", "cakd"]
    for name, model in found["models"].items():
        total = sum(n for _, _, n in model["confusion"])
        right = sum(n for true, said, n in model["confusion"] if true == said)
        assert total == 400 and right / total == pytest.approx(figures[name]["clean"]["top1"])


def test_the_mistakes_are_the_surest_of_all_wrong_answers(found, prepared, students):
    model, description = checkpoint.load(students[1])
    rows = prepared.rows("test")
    x = views.normalise(views.whole(prepared.images.squares(rows)), description["preprocess"])
    with torch.no_grad():
        confidence, said = model(x).softmax(1).max(1)
    wrong = said.numpy() != prepared.labels[rows]
    surest = np.sort(confidence.numpy()[wrong])[::-1][: evidence.MISTAKES]
    mistakes = found["models"]["cakd"]["mistakes"]
    np.testing.assert_allclose([m["confidence"] for m in mistakes], surest, atol=2e-4)
    for m in mistakes:
        at = list(rows).index(m["row"])
        assert m["label"] == prepared.labels[m["row"]] != m["predicted"] == said[at]


def test_received_attention_is_uniform_for_equal_keys_and_finds_the_one_all_ask_for():
    q = torch.randn(2, 3, 5, 8)
    same = evidence.received_attention(q, torch.zeros(2, 3, 5, 8))
    torch.testing.assert_close(same, torch.ones(2, 5))
    k = torch.zeros(2, 3, 5, 8)
    k[:, :, 2] = 50.0
    asked = evidence.received_attention(q.abs(), k)
    torch.testing.assert_close(asked[:, 2], torch.full((2,), 5.0))
    assert asked.mean(dim=1).tolist() == pytest.approx([1.0, 1.0])


def test_the_teachers_map_is_that_of_its_last_block_without_the_class_token(
    found, prepared, teacher_path
):
    live = teacher.load(teacher_path)
    block = found["attention"]
    assert block["grid"] == [8, 8] and set(block["received"]) == {"teacher", "cakd"}
    labels = prepared.labels[block["rows"]]
    assert len(set(labels)) == len(labels) == evidence.IMAGES
    assert (prepared.splits[block["rows"]] == "test").all()
    attn = live.tail.vit.blocks[-1].attn
    x = live.tail.vit.blocks[-1].norm1(
        live.look(views.whole(prepared.images.squares(block["rows"])))[0]
    )
    q, k, _ = attn.qkv(x)[:, 1:].reshape(len(labels), 64, 3, 2, 16).permute(2, 0, 3, 1, 4)
    weights = (q @ k.mT / 4).softmax(-1).mean((1, 2)) * 64
    np.testing.assert_allclose(block["received"]["teacher"], weights, atol=1e-3)


def test_a_run_without_projectors_has_no_students_map(prepared, teacher_path, students):
    _, found = evaluate(accuracy.Evaluate(), prepared, teacher_path, students[:1])
    assert set(found["attention"]["received"]) == {"teacher"}
