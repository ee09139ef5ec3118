"""Teaching as the field does it: augmented views, a CNN that guides, decay by layer, averaged weights."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pipeline import teach
from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.augment import Augment, Augmented
from pipeline.data.mixing import Mix
from pipeline.models import checkpoint, guide
from pipeline.teach import Teach
from pipeline.training import seeds
from tests.conftest import CNN, VIT

QUICK = Teach("vit_tiny_patch16_224", kwargs=VIT, epochs=1, batch=256, checkpoint_every=2)
STEPS = 6  # of 1,297 images


@pytest.fixture(scope="module")
def guide_path(prepared, tmp_path_factory):
    """An untrained CNN of the digits, sure of its answers."""
    torch.manual_seed(3)
    network = checkpoint.create("test_resnet", CNN, 10, "distill")
    with torch.no_grad():
        network.get_classifier().weight.mul_(30)
    description = {
        "role": "student",
        "method": "plain",
        "model": "test_resnet",
        "kwargs": CNN,
        "num_classes": 10,
        "classes": list(prepared.classes),
        "preprocess": checkpoint.preprocessing(network, 32),
    }
    path = tmp_path_factory.mktemp("guide") / "student.safetensors"
    checkpoint.save(path, network, description)
    return path


def taught(config, prepared, folder):
    teach.teach(config, prepared, folder / "teacher", folder / "work")
    return load_file(folder / "teacher" / "teacher.safetensors")


def batch_of(prepared, config, step=0):
    from pipeline.training.ranks import SINGLE_PROCESS

    return teach.Views(config, prepared, SINGLE_PROCESS)[step][0]


# --- augmented views ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("policy", ["trivial", "rand", "none"])
def test_an_augmented_view_is_a_function_of_seed_image_and_view(policy, prepared):
    change = Augmented(Augment(policy, erasing=0.5), 3)
    rows, numbers = np.arange(20, 52), np.full(32, -4)
    batch = views.whole(prepared.images.squares(rows))
    before = torch.get_rng_state()
    together = change(batch, rows, numbers)
    assert torch.equal(torch.get_rng_state(), before)
    alone = [
        change(batch[i : i + 1], rows[i : i + 1], numbers[i : i + 1]) for i in range(31, -1, -1)
    ]
    assert torch.equal(together, torch.cat(alone[::-1])) and together.dtype == torch.uint8
    changed = (together != batch).flatten(1).any(1)
    assert changed.float().mean() >= (0.2 if policy == "none" else 0.6)
    for other in (
        change(batch, rows, numbers - 1),
        Augmented(change.settings, 4)(batch, rows, numbers),
    ):
        assert not torch.equal(other, together)


def test_erasing_greys_one_box_of_the_share_of_views_it_is_given(prepared):
    rows = np.arange(300)
    batch = torch.full((300, 3, 32, 32), 7, dtype=torch.uint8)
    erased = Augmented(Augment(erasing=0.25), 0)(batch, rows, rows * 0) == 128
    touched = erased.flatten(1).any(1)
    assert 0.17 < touched.float().mean() < 0.33
    for mask in erased[touched][:10]:
        ys, xs = torch.where(mask[0])
        box = (ys.max() - ys.min() + 1) * (xs.max() - xs.min() + 1)
        assert mask.all(0).sum() == box == len(ys)


def test_each_image_is_augmented_before_it_is_mixed(prepared, monkeypatch):
    mix = views.Geometry(mix=Mix(mixup=1.0))
    seen = []

    def spy(batch, rows, numbers):
        seen.append(rows.tolist())
        return batch * 0 + torch.from_numpy(rows.astype(np.uint8))[:, None, None, None]

    train = prepared.rows("train")
    drawn = (mix, 0, train[:8], np.full(8, -1), train)
    found = views.view_batch(prepared.images, *drawn, spy)
    mixed = views.mixed_with(*drawn, 32)
    assert seen == [train[:8].tolist(), mixed.partners.tolist()]
    own, other = train[:8] % 256, mixed.partners % 256
    expected = np.rint(own * mixed.shares + other * (1 - mixed.shares))
    assert np.abs(found[:, 0, 0, 0].numpy() - expected).max() <= 1


def test_augmented_views_are_the_same_from_workers_and_reach_the_training(prepared, tmp_path):
    config = replace(QUICK, augment=Augment("trivial", erasing=0.25))
    plain, own = taught(QUICK, prepared, tmp_path / "a"), taught(config, prepared, tmp_path / "b")
    ahead = taught(replace(config, workers=2), prepared, tmp_path / "c")
    assert all(torch.equal(own[k], ahead[k]) for k in own)
    assert any(not torch.equal(own[k], plain[k]) for k in own)


# --- the guide ---------------------------------------------------------------------------------------------


def test_the_guides_answers_are_compared_by_kl_at_their_temperature():
    torch.manual_seed(0)
    own, other = torch.randn(5, 10), torch.randn(5, 10)
    for temperature in (1.0, 3.0):
        p, q = ((x / temperature).softmax(1) for x in (other, own))
        expected = temperature**2 * (p * (p.log() - q.log())).sum(1)
        torch.testing.assert_close(guide.answers(own, other, temperature), expected)
    assert guide.answers(other, other, 2.0).abs().max() < 1e-6


def test_a_lesson_in_bfloat16_takes_its_differences_in_float32():
    """Of close answers a difference in bfloat16 is rounding: a KL divergence below zero."""
    generator = torch.Generator().manual_seed(0)
    own = torch.randn(64, 100, generator=generator).bfloat16()
    other = (own + 0.03 * torch.randn(64, 100, generator=generator)).bfloat16()
    tokens, feature = own.reshape(16, 16, 25), other.reshape(16, 16, 25).mT.reshape(16, 25, 4, 4)
    with torch.autocast("cpu", torch.bfloat16):
        answered = guide.answers(own, other, 1.0)
        followed = guide.features(tokens, feature, (4, 4))
    assert torch.equal(answered, guide.answers(own.float(), other.float(), 1.0))
    assert torch.equal(followed, guide.features(tokens.float(), feature.float(), (4, 4)))
    assert answered.dtype == followed.dtype == torch.float32 and (answered > 0).all()


def test_the_guides_features_are_compared_position_by_position_whatever_their_scale():
    torch.manual_seed(0)
    feature = torch.randn(2, 6, 4, 4)
    tokens = feature.flatten(2).mT
    assert guide.features(3 * tokens + 1, 5 * feature, (4, 4)).max() < 1e-4
    moved = guide.features(tokens.roll(1, dims=1), feature, (4, 4))
    assert moved.min() > 0.5 and moved.shape == (2,)
    resized = guide.features(tokens, F.interpolate(feature, (8, 8), mode="nearest"), (4, 4))
    assert resized.max() < 1e-4


def test_the_loss_is_the_labels_share_and_the_guides_on_the_very_views(prepared, guide_path):
    mix = views.Geometry(mix=Mix(mixup=0.8, cutmix=1.0))
    config = replace(
        QUICK,
        geometry=mix,
        guide=str(guide_path),
        guide_weight=0.3,
        guide_temperature=2.0,
        label_smoothing=0.1,
    )
    vit, described = teach._build(config, prepared)
    vit.eval()
    lesson = teach.Lesson(vit, config, prepared, described["preprocess"])
    batch = batch_of(prepared, config)
    losses = lesson(batch.views, batch)
    network, description = checkpoint.load(guide_path)
    logits = vit(views.normalise(batch.views, described["preprocess"]))
    answered = network(views.normalise(batch.views, description["preprocess"]))
    own, other = (
        F.cross_entropy(logits, y, reduction="none", label_smoothing=0.1)
        for y in (batch.labels, batch.partner_labels)
    )
    labels = batch.shares * own + (1 - batch.shares) * other
    expected = 0.7 * labels + 0.3 * guide.answers(logits, answered, 2.0)
    torch.testing.assert_close(losses, expected)
    losses.mean().backward()
    assert all(p.grad is None for p in lesson.guide.parameters())


def test_a_guided_training_differs_and_goes_on_to_the_same_bits(
    prepared, guide_path, tmp_path, monkeypatch
):
    config = replace(
        QUICK,
        guide=str(guide_path),
        guide_features=0.5,
        ema=0.5,
        clip_norm=1.0,
        layer_decay=0.7,
        augment=Augment("trivial"),
    )
    whole = taught(config, prepared, tmp_path / "whole")
    assert {*whole} == {*taught(QUICK, prepared, tmp_path / "plain")}  # nothing of the guide stays

    class Killed(Exception):
        pass

    exact = seeds.step_seed

    def killing(seed, step, stream):
        if step == 4:
            raise Killed
        return exact(seed, step, stream)

    monkeypatch.setattr(seeds, "step_seed", killing)
    with pytest.raises(Killed):
        taught(config, prepared, tmp_path / "killed")
    monkeypatch.setattr(seeds, "step_seed", exact)
    resumed = taught(config, prepared, tmp_path / "killed")
    assert all(torch.equal(resumed[k], whole[k]) for k in whole)
    for change in (
        {"guide_features": 0.0},
        {"guide_weight": 0.2},
        {"guide_temperature": 2.0},
        {"ema": 0.0},
        {"clip_norm": 0.01},
        {"layer_decay": 1.0},
    ):
        other = taught(replace(config, **change), prepared, tmp_path / next(iter(change)))
        assert any(not torch.equal(other[k], whole[k]) for k in whole), change


def test_layer_decay_slows_the_first_blocks_and_no_parameter_is_left_out(prepared):
    config = replace(QUICK, layer_decay=0.5)
    vit, described = teach._build(config, prepared)
    groups = teach._groups(
        vit, teach.Lesson(vit, config, prepared, described["preprocess"]), config
    )
    scale = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert len(scale) == len(list(vit.parameters()))
    head, *blocks = (
        scale[id(p)] for p in (vit.head.weight, *(b.mlp.fc1.weight for b in vit.blocks[::-1]))
    )
    assert head == 1 and blocks == [0.5**n for n in range(1, len(blocks) + 1)]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"guide": "nowhere.safetensors"},
            "teach.guide: got nowhere.safetensors, which is not a file",
        ),
        ({"weights": "nowhere.safetensors"}, "expected scratch, pretrained or a .safetensors file"),
    ],
)
def test_a_file_that_is_not_there_is_named(values, message, prepared, tmp_path):
    with pytest.raises(UserError, match=message):
        taught(replace(QUICK, **values), prepared, tmp_path)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"layer_decay": 0.0}, "layer_decay: got 0.0"),
        ({"augment": {"policy": "auto"}}, "augment.policy: got 'auto'"),
        ({"ema": 1.0}, "ema: got 1.0"),
        ({"guide_weight": 2.0}, "guide_weight: got 2.0"),
        (
            {"guide": "g", "guide_features": 0.5, "kwargs": {"patch_drop_rate": 0.25}},
            "got guide_features 0.5 with kwargs.patch_drop_rate 0.25; expected one of them",
        ),
    ],
)
def test_settings_out_of_range_are_named(values, message):
    with pytest.raises(UserError, match=message):
        parse(Teach, {"model": "vit_tiny_patch16_224", **values}, "teach")


def test_a_guide_of_other_classes_is_refused(prepared, guide_path, tmp_path):
    other = replace(prepared, classes=tuple("abcdefghij"))
    with pytest.raises(
        UserError, match=r"teach.guide: .*got 10 classes at 32 px.*by the same names"
    ):
        taught(replace(QUICK, guide=str(guide_path)), other, tmp_path)
