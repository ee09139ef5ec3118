"""The method as it trains: who gets a gradient from which term, cached against online, resume, what is kept."""

from __future__ import annotations

import copy
import json
import os
import resource
import signal
import subprocess
import sys
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import psutil
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

from pipeline.core import artifacts
from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.data import views
from pipeline.data.mixing import Mix
from pipeline.distill import curves, robust
from pipeline.distill import distill as distillation
from pipeline.distill.batches import Batches, BatchIndices, Stream
from pipeline.distill.distill import distill
from pipeline.distill.kernels.philox import Key
from pipeline.distill.kernels.reference import attention, dropout, gl_project, heads, swap_masks
from pipeline.distill.methods import cakd
from pipeline.distill.methods.cakd import CakdConfig
from pipeline.distill.methods.term import TeacherSpace
from pipeline.distill.settings import CrossEntropyConfig, Distill
from pipeline.distill.trainer import build, discriminator_step, student_step, train_step
from pipeline.models import checkpoint, teacher
from pipeline.models.student import Taps
from pipeline.store import policy, writing
from pipeline.training import loop, stopwatch
from pipeline.training.compute import Compute
from pipeline.training.seeds import step_seed
from tests.accidents import UNCOUNTED
from tests.conftest import CNN, ROOT

LOSS_TERMS = ("cross_entropy", "logits", "attention", "gram", "tokens", "adversarial")
QUICK = Distill(
    methods=("plain", "cakd+logits"),
    student="test_resnet",
    student_kwargs=CNN,
    steps=21,
    checkpoint_every=5,
)
GEOMETRY = views.Geometry()


@pytest.fixture
def make(prepared, teacher_path, features):
    return lambda method, config=QUICK: build(config, method, prepared, teacher_path, features)


def run(config, method, prepared, teacher_path, features, folder):
    args = (prepared, teacher_path, features, folder / method, folder / "work")
    return distill(config, method, *args)


def loss_terms(trainer, step=0):
    """The terms of one batch, with their graph."""
    kept = {}
    forward = trainer.objective.forward

    def spy(*args):
        kept.update(forward(*args).terms)
        raise StopIteration

    trainer.objective.forward = spy
    with pytest.raises(StopIteration):
        student_step(trainer, step, stopwatch.Stopwatch())
    trainer.objective.forward = forward
    return kept


@pytest.mark.parametrize("term", LOSS_TERMS)
def test_each_loss_term_alone_reaches_the_students_backbone(term, make):
    trainer = make("cakd+logits")
    # timm starts each residual branch at zero: one step opens them.
    train_step(trainer, 0, stopwatch.Stopwatch())
    trainer.student.zero_grad()
    trainer.objective.zero_grad()
    loss_terms(trainer, step=7)[term].backward()
    reached = [p.grad is not None and p.grad.abs().sum() > 0 for p in trainer.student.parameters()]
    names = [n for n, _ in trainer.student.named_parameters()]
    if term in ("cross_entropy", "logits"):
        assert all(reached)
    else:
        backbone = [r for r, n in zip(reached, names, strict=True) if not n.startswith("fc.")]
        assert sum(backbone) >= 0.8 * len(backbone)
    assert all(p.grad is None for p in trainer.feed.features.tail.parameters())
    assert all(p.grad is None for p in trainer.objective.discriminator.parameters())


def test_a_step_computes_every_term_from_its_own_rows_views_masks_and_trans(
    prepared, teacher_path, make
):
    """The whole wiring, done again by hand from (seed, step): rows, views, Trans, swap, drop-out, scales."""
    config = replace(QUICK, seed=3, cakd=CakdConfig(standardise=True, swap_anneal=True))
    trainer, step = make("cakd+logits", config), 9
    student = copy.deepcopy(trainer.student).train()
    parts, space = trainer.objective.loss_terms, trainer.space
    found = loss_terms(trainer, step)

    chosen = trainer.feed.views.batches(step)
    rows, ks, labels = chosen.rows, chosen.view_numbers, torch.from_numpy(chosen.labels)
    assert chosen.fresh == 32
    store, train = trainer.feed.features.store, prepared.rows("train")
    batch = views.view_batch(prepared.images, store.geometry, store.seed, rows, ks, train)
    taught = teacher.load(teacher_path)(batch[32:])
    records = [list(train).index(r) * 2 + k for r, k in zip(rows[32:], ks[32:], strict=True)]
    seeds = [step_seed(3, step, f"trans {r} {k}") for r, k in zip(rows, ks, strict=True)]
    pixels = config.cakd.trans(batch, seeds)
    assert not torch.equal(pixels, batch.float())
    with Taps(student, ["layer4"]) as taps:
        logits = student(views.normalise(pixels, trainer.reader.preprocess))
        native = taps.features["layer4"][32:]
        feature = F.interpolate(native, (8, 8), mode="bilinear")
    key = Key(3, torch.tensor(records), step)
    project, p = parts["pca"].project, 0.5 * (1 - step / 21)
    maps = [
        F.interpolate(c(native), (8, 8), mode="bilinear") for c in (project.q, project.k, project.v)
    ]
    qkv_s = torch.stack([m.flatten(2).mT.reshape(32, 64, 2, 16) for m in maps], dim=2)
    mixed = torch.where(swap_masks(key, qkv_s.shape, p, "element"), taught.qkv, qkv_s)
    x = dropout(feature.flatten(2).transpose(1, 2), key, 0.1)
    gl = parts["gl"].project
    h_s = gl_project(x, gl.weight, gl.bias, gl.groups)
    v_s, v_t = qkv_s[:, :, 2].transpose(1, 2), taught.qkv[:, :, 2].transpose(1, 2)
    expected = {
        "cross_entropy": F.cross_entropy(logits[:32], labels[:32]),
        "logits": 16
        * F.kl_div(
            (logits[32:] / 4).log_softmax(1), (taught.logits / 4).softmax(1), reduction="batchmean"
        ),
        "attention": F.mse_loss(attention(*heads(mixed)), attention(*heads(taught.qkv))),
        "gram": F.mse_loss(v_s @ v_s.mT / 4, v_t @ v_t.mT / 4),
        "tokens": F.mse_loss(h_s, (taught.h - space.mean) / space.std),
        "adversarial": -trainer.objective.discriminator(h_s).sigmoid().log().mean(),
    }
    assert set(found) == set(expected)
    for term, value in expected.items():
        assert found[term].item() == pytest.approx(value.item(), rel=1e-4), term


def test_the_step_follows_warm_up_and_schedule(make):
    trainer = make("cakd")
    timer = stopwatch.Stopwatch()
    for step, moved in ((0, False), (5, True)):
        student_step(trainer, step, timer)
        gradient = trainer.objective.loss_terms["pca"].project.q.weight.grad
        assert (gradient.abs().sum() > 0) == moved
        rate = trainer.optimizers["student"].param_groups[0]["lr"]
        assert rate == loop.learning_rate(step, 21, QUICK.lr)


def test_the_discriminator_is_shown_what_the_student_is_held_against(make, monkeypatch):
    trainer = make("cakd", replace(QUICK, cakd=CakdConfig(standardise=True)))
    shown = []
    exact = robust.discriminator

    def spy(network, real, fake):
        shown.append(real)
        return exact(network, real, fake)

    monkeypatch.setattr(robust, "discriminator", spy)
    train_step(trainer, 0, stopwatch.Stopwatch())
    assert shown[0].mean().abs() < 0.2 and shown[0].std() == pytest.approx(1, abs=0.2)


@pytest.mark.parametrize("granularity", ["token", "matrix", "none"])
def test_the_granularity_asked_is_the_one_used(granularity, make, monkeypatch):
    asked = []
    exact = cakd.pca.pca_loss

    def spy(*args):
        asked.append(args[3:])
        return exact(*args)

    monkeypatch.setattr(cakd.pca, "pca_loss", spy)
    loss_terms(make("cakd", replace(QUICK, cakd=CakdConfig(granularity=granularity))))
    assert asked == [(0.5, granularity, "auto")]


class Killed(Exception):
    """What a kill looks like from inside: no handler of the training knows it."""


@contextmanager
def killed_at(number):
    """The training inside ends at this step, before it."""

    def step(trainer, now, timer):
        if now == number:
            raise Killed
        return train_step(trainer, now, timer)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(distillation, "train_step", step)
        yield


def test_unfinished_work_of_other_labels_is_not_gone_on_with(
    prepared, teacher_path, features, tmp_path
):
    with killed_at(12):
        run(QUICK, "plain", prepared, teacher_path, features, tmp_path / "killed")
    every = replace(prepared, student_label=prepared.splits == "train", index_sha256="other")
    for folder in ("killed", "whole"):
        run(QUICK, "plain", every, teacher_path, features, tmp_path / folder)
    name = "plain/student.safetensors"
    assert artifacts.sha256(tmp_path / "killed" / name) == artifacts.sha256(
        tmp_path / "whole" / name
    )


def test_a_diverged_training_is_named_and_publishes_nothing(
    prepared, teacher_path, features, tmp_path
):
    config = replace(QUICK, lr=1e30)
    with pytest.raises(
        UserError, match=r"cross_entropy: got (nan|inf) at step \d+.*lower distill.lr"
    ):
        run(config, "plain", prepared, teacher_path, features, tmp_path)
    assert not (tmp_path / "plain").exists()


def test_a_few_unlabelled_images_do_not_change_the_share_of_labels(prepared):
    shown = prepared.splits == "train"
    shown[prepared.rows("train")[0]] = False
    labels = batches(replace(prepared, student_label=shown))(0).labels
    assert (labels >= 0).sum() == 32


def test_the_students_step_leaves_the_discriminator_alone_and_its_own_step_moves_only_it(make):
    trainer = make("cakd")
    network = trainer.objective.discriminator

    def copy(module):
        return [p.detach().clone() for p in module.parameters()]

    before, student_before = copy(network), copy(trainer.student)
    _, real, fake = student_step(trainer, 0, stopwatch.Stopwatch())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(p.grad is None for p in network.parameters())
    assert not all(
        torch.equal(a, b) for a, b in zip(student_before, trainer.student.parameters(), strict=True)
    )
    student_after = copy(trainer.student)
    assert not fake.requires_grad
    discriminator_step(trainer, real, fake)
    assert not all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))
    assert all(
        torch.equal(a, b) for a, b in zip(student_after, trainer.student.parameters(), strict=True)
    )


def test_the_discriminator_steps_every_fifth_iteration(make):
    trainer = make("cakd")
    timer = stopwatch.Stopwatch()
    stepped = ["discriminator" in train_step(trainer, step, timer) for step in range(11)]
    assert [i for i, s in enumerate(stepped) if s] == [0, 5, 10]


@pytest.fixture(scope="module")
def online(prepared, teacher_path, tmp_path_factory):
    """The policy of `features` with no record stored: the teacher runs while distilling."""
    folder = tmp_path_factory.mktemp("online")
    cache = policy.Cache(mode="off", dtype="float32", views=2)
    live = teacher.load(teacher_path)
    writing.write(cache, prepared, live, folder / "store", folder / "work", lambda _: None)
    return folder / "store"


def test_cached_and_online_teacher_give_the_same_losses(make, online, prepared, teacher_path):
    cached = make("cakd+logits")
    live = build(QUICK, "cakd+logits", prepared, teacher_path, online)
    assert live.feed.features.live is not None
    assert cached.feed.features.live is None
    for step in (0, 3):
        a, b = loss_terms(cached, step), loss_terms(live, step)
        for term in LOSS_TERMS:
            assert a[term].item() == pytest.approx(b[term].item(), rel=1e-6), term


def test_in_the_stores_own_write_batches_the_losses_are_the_same_bits(
    make, online, prepared, teacher_path, monkeypatch
):
    rows = prepared.rows("train")

    def in_order(self, step):
        records = np.arange(step * 64, step * 64 + 64)
        chosen = rows[records // 2]
        labels, ones = prepared.labels[chosen], np.ones(64, np.float32)
        return BatchIndices(0, chosen, records % 2, labels, labels, ones, records)

    monkeypatch.setattr(Batches, "__call__", in_order)
    cached, live = (
        make("cakd+logits"),
        build(QUICK, "cakd+logits", prepared, teacher_path, online),
    )
    for step in (0, 7):
        a, b = loss_terms(cached, step), loss_terms(live, step)
        assert {t: v.item() for t, v in a.items()} == {t: v.item() for t, v in b.items()}


@pytest.mark.parametrize(
    ("dtype", "layout"),
    [(d, "block_input") for d in ("float16", "bfloat16", "int8")] + [("float16", "qkvh")],
)
def test_a_coarser_store_changes_the_losses_by_no_more_than_its_manifest_says(
    dtype, layout, make, prepared, teacher_path, tmp_path
):
    cache = policy.Cache(dtype=dtype, layout=layout, views=2)
    live = teacher.load(teacher_path)
    manifest = writing.write(cache, prepared, live, tmp_path / "s", tmp_path / "w", lambda _: None)
    error = max(manifest["error"].values())
    coarse = build(QUICK, "cakd+logits", prepared, teacher_path, tmp_path / "s")
    a, b = loss_terms(make("cakd+logits"), 0), loss_terms(coarse, 0)
    assert a["logits"].item() == pytest.approx(b["logits"].item(), rel=1e-6)
    for term in ("attention", "gram", "tokens"):
        # A squared distance moves by twice the relative error of its target, a Gram matrix holds V twice: 4.
        assert a[term].item() == pytest.approx(b[term].item(), rel=4 * error), term


def test_batches_made_by_workers_train_to_the_same_bits(prepared, teacher_path, features, tmp_path):
    for workers in (0, 2):
        config = replace(QUICK, workers=workers)
        run(config, "cakd+logits", prepared, teacher_path, features, tmp_path / str(workers))
    for path in (tmp_path / "0" / "cakd+logits").iterdir():
        assert path.read_bytes() == (tmp_path / "2" / "cakd+logits" / path.name).read_bytes()


def test_one_record_in_a_thousand_is_held_against_its_view(make, monkeypatch):
    trainer, checked = make("logits"), []
    monkeypatch.setattr(views, "check_hashes", lambda v, h, rows: checked.append(len(rows)))
    timer = stopwatch.Stopwatch()
    for step in range(40):
        next(trainer.feed.batches(step, timer))
    assert checked == [32, 1]  # the first batch, then record 1,000 of the 1,280


def test_warm_up_brings_the_distillation_terms_in_over_the_first_tenth(make):
    objective = make("cakd+logits").objective
    assert objective.weights(0.0)["attention"] == 0 and objective.weights(0.0)["cross_entropy"] == 1
    assert objective.weights(0.05)["adversarial"] == pytest.approx(0.05)
    assert objective.weights(0.5) == {
        "cross_entropy": 1.0,
        "logits": 1.0,
        "attention": 1.0,
        "gram": 0.05,
        "tokens": 1.0,
        "adversarial": 0.1,
    }


def test_cakd_holds_no_logit_term_and_plain_holds_nothing_of_the_teacher(make):
    assert set(loss_terms(make("cakd"))) == {
        "cross_entropy",
        "attention",
        "gram",
        "tokens",
        "adversarial",
    }
    plain = make("plain")
    assert set(loss_terms(plain)) == {"cross_entropy"}
    assert plain.feed.features is None and not list(plain.objective.parameters())


def batches(prepared, config=QUICK, paired=True, n_views=2, geometry=GEOMETRY):
    return Batches(config, prepared, paired, n_views, geometry, seed=0)


def test_a_paired_batch_has_labelled_images_in_fresh_views_and_all_images_in_cached_ones(prepared):
    drawn = batches(prepared)
    for step in range(30):
        chosen = drawn(step)
        shown = chosen.labels >= 0
        assert len(chosen.rows) == 64 and chosen.fresh == 32
        assert shown[:32].all() and not shown[32:].any()
        assert prepared.student_label[chosen.rows[shown]].all()
        assert (prepared.labels[chosen.rows][shown] == chosen.labels[shown]).all()
        assert set(chosen.view_numbers[32:]) <= {0, 1}
    assert drawn(29).view_numbers[:32].max() > 10  # a fresh view at every pass of 50 images
    assert drawn.labels_seen == 50


def test_the_share_of_labels_is_the_one_asked_and_leaves_room_for_two_others(prepared):
    for share, fresh in ((0.25, 16), (0.001, 1), (0.999, 62)):
        assert batches(prepared, replace(QUICK, labelled_share=share))(0).fresh == fresh
    with pytest.raises(UserError, match="labelled_share: got 0.0, with 50 of 1297 images labelled"):
        batches(prepared, replace(QUICK, labelled_share=0.0))
    silent = replace(QUICK, labelled_share=0.0, cross_entropy=CrossEntropyConfig(weight=0.0))
    assert (batches(prepared, silent)(0).labels == -1).all()


def test_every_micro_batch_has_cached_views_or_the_share_is_refused(make):
    accumulated = replace(QUICK, labelled_share=0.9, compute=Compute(accumulate=4))
    with pytest.raises(
        UserError, match="leaves 6 cached views of a batch of 64 to 4 micro-batches"
    ):
        make("logits", accumulated)
    trainer = make("logits", replace(accumulated, labelled_share=0.8))
    for batch in trainer.feed.batches(0, stopwatch.Stopwatch()):
        cached = len(batch.indices.cached.rows)
        assert cached >= 2 and len(batch.teacher.logits) == cached


def test_plain_trains_on_labelled_images_only_for_the_same_number_of_steps(prepared):
    plain, paired = batches(prepared, paired=False), batches(prepared)
    chosen = plain(20)
    assert plain.steps == paired.steps == 21 and chosen.fresh == 64
    assert (chosen.labels >= 0).all() and prepared.student_label[chosen.rows].all()
    assert chosen.view_numbers.max() > 2  # a fresh view at every pass


def test_the_control_sees_the_batches_of_a_distilled_method_and_reads_no_teacher(make):
    control, cakd = make("control"), make("gl+pca")
    for step in (0, 7):
        for name, column in vars(control.feed.views.indices(step)[0]).items():
            assert np.array_equal(column, getattr(cakd.feed.views.indices(step)[0], name))
    assert control.feed.features is None and set(loss_terms(control)) == {"cross_entropy"}


WEIGHTLESS = {
    "logits": {"logits.weight": 0.0},
    **{f"terms.{t}": {f"terms.{t}.weight": 0.0} for t in ("dkd", "fitnet", "at", "crd", "ofa")},
    **{f"terms.{t}": {f"terms.{t}.weight": 0.0} for t in ("rsd", "minilm", "queue", "affinity")},
    **{f"terms.{t}": {f"terms.{t}.weight": 0.0} for t in ("ofd", "reviewkd", "london", "afd")},
    **{f"terms.{t}": {f"terms.{t}.weight": 0.0} for t in ("ab", "deit")},
    "terms.scalekd": {"terms.scalekd.weight": 0.0, "terms.scalekd.frequency_weight": 0.0},
    "terms.ft": {"terms.ft.weight": 0.0, "terms.ft.reconstruction_weight": 0.0},
    "terms.rkd": {"terms.rkd.distance_weight": 0.0, "terms.rkd.angle_weight": 0.0},
    "terms.irg": {f"terms.irg.{k}_weight": 0.0 for k in ("vertex", "edge", "transform")},
    "cakd": {f"cakd.{k}_weight": 0.0 for k in ("attention", "gram", "tokens", "adversarial")},
}


@pytest.mark.parametrize("settings", WEIGHTLESS)
@pytest.mark.parametrize(
    "change", [{}, pytest.param({"clip_norm": 0.1, "optimizer": "sgd"}, marks=pytest.mark.ci)]
)
def test_without_weight_every_method_is_its_control_to_the_bit(settings, change, make):
    config = replace(QUICK, **change).with_choice(WEIGHTLESS[settings], "all")
    method = settings.removeprefix("terms.")
    control = "control+trans" if method == "cakd" else "control"
    timer = stopwatch.Stopwatch()
    ours, theirs = make(method, config), make(control, config)
    for step in range(6):
        train_step(ours, step, timer)
        train_step(theirs, step, timer)
    for a, b in zip(ours.student.parameters(), theirs.student.parameters(), strict=True):
        assert torch.equal(a, b)


def test_with_all_labels_every_image_of_the_batch_is_labelled(prepared):
    every = replace(prepared, student_label=prepared.splits == "train")
    chosen = batches(every)(0)
    assert (chosen.labels == every.labels[chosen.rows]).all()


MIXED = replace(GEOMETRY, mix=Mix(mixup=1.0, cutmix=0.4, probability=0.8))


def test_a_labelled_view_is_mixed_with_a_labelled_image_whose_label_is_known(prepared):
    drawn = batches(prepared, geometry=MIXED)
    for step in range(10):
        chosen = drawn(step)
        labelled = slice(0, chosen.fresh)
        assert (chosen.partner_labels[labelled] >= 0).all()
        assert 0.5 < (chosen.shares < 1).mean() <= 1
    mixed = views.mixed_with(
        MIXED, 0, chosen.rows[:32], chosen.view_numbers[:32], drawn.labelled_rows, 32
    )
    assert prepared.student_label[mixed.partners].all()
    assert (prepared.labels[mixed.partners] == chosen.partner_labels[:32]).all()
    assert (mixed.shares == chosen.shares[:32]).all()


def mixed_store(prepared, teacher_path, folder, **changes):
    cache = policy.Cache(views=2, geometry=MIXED, dtype="float32", **changes)
    writing.write(
        cache, prepared, teacher.load(teacher_path), folder, folder.parent / "w", lambda _: None
    )
    return folder


def test_in_mixed_views_the_cached_teacher_answers_as_the_one_that_runs(
    prepared, teacher_path, tmp_path, monkeypatch
):
    """In the store's write batches to the bit; the view hashes say that both saw the same mix."""
    rows = prepared.rows("train")

    def in_order(self, step):
        records = np.arange(step * 64, step * 64 + 64)
        hidden, ones = np.full(64, -1), np.ones(64, np.float32)
        return BatchIndices(0, rows[records // 2], records % 2, hidden, hidden, ones, records)

    monkeypatch.setattr(Batches, "__call__", in_order)
    stores = [
        mixed_store(prepared, teacher_path, tmp_path / mode, mode=mode) for mode in ("on", "off")
    ]
    cached, live = (build(QUICK, "cakd+logits", prepared, teacher_path, s) for s in stores)
    a, b = loss_terms(cached, 0), loss_terms(live, 0)
    assert {t: v.item() for t, v in a.items()} == {t: v.item() for t, v in b.items()}


def test_killed_with_mixing_momentum_clipping_and_averaging_it_goes_on_to_the_same_bits(
    prepared, teacher_path, tmp_path
):
    store = mixed_store(prepared, teacher_path, tmp_path / "mixed")
    config = replace(
        QUICK,
        optimizer="sgd",
        clip_norm=0.5,
        weights="balanced",
        cross_entropy=CrossEntropyConfig(label_smoothing=0.1),
        compute=Compute(ema=0.9),
    )
    whole = run(config, "cakd+queue", prepared, teacher_path, store, tmp_path / "whole")
    with killed_at(12):
        run(config, "cakd+queue", prepared, teacher_path, store, tmp_path / "killed")
    again = run(config, "cakd+queue", prepared, teacher_path, store, tmp_path / "killed")
    assert json.dumps(again["curves"]) == json.dumps(whole["curves"])
    assert again["weights"] == whole["weights"]
    name = "cakd+queue/student.safetensors"
    first, second = (artifacts.sha256(tmp_path / k / name) for k in ("whole", "killed"))
    assert first == second


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_depthwise_student_killed_in_channels_last_goes_on_to_the_same_bits(
    optimizer, prepared, teacher_path, features, tmp_path
):
    """Its moments come back in the memory format of its weights."""
    config = replace(QUICK, student="test_efficientnet", student_kwargs={}, optimizer=optimizer)
    whole = run(config, "logits", prepared, teacher_path, features, tmp_path / "whole")
    with killed_at(12):
        run(config, "logits", prepared, teacher_path, features, tmp_path / "killed")
    again = run(config, "logits", prepared, teacher_path, features, tmp_path / "killed")
    assert json.dumps(again["curves"]) == json.dumps(whole["curves"])
    first, second = (
        artifacts.sha256(tmp_path / k / "logits/student.safetensors") for k in ("whole", "killed")
    )
    assert first == second


@pytest.mark.parametrize(("optimizer", "kind"), [("adamw", "AdamW"), ("sgd", "SGD")])
def test_norms_and_biases_do_not_decay(optimizer, kind, make):
    trainer = make("gl+pca", replace(QUICK, optimizer=optimizer))
    made = trainer.optimizers["student"]
    assert type(made).__name__ == kind
    for group in made.param_groups:
        matrices = {p.ndim > 1 for p in group["params"]}
        assert matrices == {group["weight_decay"] > 0}
        assert optimizer != "sgd" or (group["nesterov"] and group["momentum"] == 0.9)
    trained = sum(len(group["params"]) for group in made.param_groups)
    assert trained == len([*trainer.student.parameters(), *trainer.objective.trained()])


def test_a_clipped_step_has_no_longer_gradient_than_asked(make):
    trainer = make("gl+pca", replace(QUICK, clip_norm=0.01))
    student_step(trainer, 3, stopwatch.Stopwatch())
    for parameters in (trainer.student.parameters(), trainer.objective.trained()):
        norm = torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm()
        assert norm.item() == pytest.approx(0.01, rel=1e-3)


def test_balanced_weights_bring_every_term_to_the_asked_ratio(make):
    config = replace(QUICK, weights="balanced", balance=0.25, cakd=CakdConfig(warmup=0.0))
    trainer = make("gl+pca+logits", config)
    timer = stopwatch.Stopwatch()
    first = train_step(trainer, 0, timer)
    for term in ("attention", "gram", "tokens", "logits"):
        assert first[f"ratio_{term}"] == pytest.approx(0.25, rel=1e-5)
    for step in range(1, 20):
        train_step(trainer, step, timer)
        if step == 15:
            found = trainer.objective.weights(1.0)
    assert trainer.objective.weights(1.0) == found  # by the first sixteen steps
    assert all(w > 0 for w in found.values()) and found["cross_entropy"] == 1.0


def test_a_balanced_ratio_is_over_the_weighted_cross_entropy(make):
    config = replace(
        QUICK, weights="balanced", balance=0.25, cross_entropy=CrossEntropyConfig(weight=4.0)
    )
    first = train_step(make("logits", config), 0, stopwatch.Stopwatch())
    assert first["ratio_logits"] == pytest.approx(0.25, rel=1e-5)


def test_balanced_weights_of_a_batch_in_parts_are_refused(make):
    config = replace(QUICK, weights="balanced", compute=Compute(accumulate=2))
    with pytest.raises(UserError, match="distill.weights: got balanced with 2 micro-batches"):
        make("logits", config)


def test_the_ratio_of_a_term_is_its_weighted_gradient_over_that_of_the_cross_entropy(make):
    trainer = make("logits", QUICK.with_choice({"logits.weight": 3.0}, "all"))
    figures = train_step(trainer, 0, stopwatch.Stopwatch())
    again = make("logits", QUICK.with_choice({"logits.weight": 3.0}, "all"))
    norms = {}
    for term, loss in loss_terms(again, 0).items():
        again.student.zero_grad()
        loss.backward(retain_graph=True)
        named = again.student.named_parameters()
        grads = [
            p.grad.flatten() for n, p in named if not n.startswith("fc.") and p.grad is not None
        ]
        norms[term] = torch.cat(grads).norm().item()
    expected = 3 * norms["logits"] / norms["cross_entropy"]
    assert figures["ratio_logits"] == pytest.approx(expected, rel=1e-4)


def test_one_pass_of_a_stream_is_a_permutation(prepared):
    rows = prepared.rows("train")
    taken, passes = Stream(rows, 0, "all").take(0, len(rows))
    assert sorted(taken) == sorted(rows) and not passes.any()
    again, _ = Stream(rows, 1, "all").take(0, len(rows))
    assert not (again == taken).all()


def test_a_batch_is_drawn_once_a_step(make, monkeypatch):
    """By the views and by what is read ahead, which asks for the next step too."""
    drawn = []
    exact = Batches._draw
    monkeypatch.setattr(
        Batches, "_draw", lambda self, step: (drawn.append(step), exact(self, step))[1]
    )
    trainer = make("cakd+logits")
    for step in range(5):
        train_step(trainer, step, stopwatch.Stopwatch())
    assert drawn == [0, 1, 2, 3, 4, 5]


def test_a_stream_goes_on_over_the_end_of_a_pass_and_can_be_entered_anywhere():
    stream = Stream(np.arange(10, 17), 3, "all")
    rows, passes = stream.take(0, 30)
    assert (passes == np.arange(30) // 7).all()
    for number in range(4):
        assert sorted(rows[passes == number]) == list(range(10, 17))
    later, later_passes = stream.take(11, 12)
    assert (later == rows[11:23]).all() and (later_passes == passes[11:23]).all()


@pytest.mark.parametrize("method", ["plain", "cakd+logits"])
def test_same_seed_same_bits_and_the_student_is_the_plain_timm_model(
    method, prepared, teacher_path, features, tmp_path
):
    first, second = tmp_path / "a", tmp_path / "b"
    for folder in (first, second):
        run(QUICK, method, prepared, teacher_path, features, folder)
    for path in (first / method).iterdir():
        assert path.read_bytes() == (second / method / path.name).read_bytes(), path.name
    model, description = checkpoint.load(first / method / "student.safetensors")
    plain = timm.create_model("test_resnet", num_classes=10, **CNN)
    assert set(model.state_dict()) == set(plain.state_dict())
    assert description["labels_seen"] == 50 and description["method"] == method
    assert (first / method / "projectors.safetensors").exists() == (method != "plain")


def test_a_run_killed_at_any_step_goes_on_to_the_same_bits(
    prepared, teacher_path, features, tmp_path, monkeypatch
):
    undisturbed = run(QUICK, "cakd+logits", prepared, teacher_path, features, tmp_path / "whole")
    for number in (3, 7, 12, 20):
        with killed_at(number):
            run(QUICK, "cakd+logits", prepared, teacher_path, features, tmp_path / "killed")
    resumed = []

    def watch_step(trainer, number, timer):
        resumed.append(number)
        return train_step(trainer, number, timer)

    monkeypatch.setattr(distillation, "train_step", watch_step)
    figures = run(QUICK, "cakd+logits", prepared, teacher_path, features, tmp_path / "killed")
    assert json.dumps(figures["curves"]) == json.dumps(undisturbed["curves"])
    assert resumed == [20]  # the last checkpoint, not the beginning
    for name in ("student.safetensors", "projectors.safetensors"):
        whole, killed = (tmp_path / k / "cakd+logits" / name for k in ("whole", "killed"))
        assert artifacts.sha256(whole) == artifacts.sha256(killed)


def test_every_term_is_logged_and_the_figures_have_their_units(
    prepared, teacher_path, features, tmp_path
):
    figures = run(QUICK, "cakd+logits", prepared, teacher_path, features, tmp_path)
    ratios = {f"ratio_{term}" for term in LOSS_TERMS if term != "cross_entropy"}
    named = {*LOSS_TERMS, *ratios, "discriminator", "discriminator_accuracy"}
    assert named == set(figures["curves"])
    assert set(figures["weights"]) == set(LOSS_TERMS) and figures["weights"]["gram"] == 0.05
    assert figures["curves"]["attention"][-1][0] == figures["steps"] == 21
    assert set(figures["stage_ms"]) == set(curves.STAGES)
    assert figures["img_per_s"]["median"] > 0 and 0 <= figures["stall_fraction"] < 1


def test_a_changed_view_is_noticed_while_training(prepared, teacher_path, features, monkeypatch):
    trainer = build(QUICK, "logits", prepared, teacher_path, features)
    trainer.feed.views.batches.seed += 1
    with pytest.raises(UserError, match="views with other pixels"):
        train_step(trainer, 0, stopwatch.Stopwatch())


def test_the_saved_projectors_come_back_as_they_were(prepared, teacher_path, features, tmp_path):
    run(QUICK, "cakd", prepared, teacher_path, features, tmp_path)
    _, description = checkpoint.load(tmp_path / "cakd" / "student.safetensors")
    projectors = cakd.load_projectors(tmp_path / "cakd", description)
    stored = load_file(tmp_path / "cakd" / "projectors.safetensors")
    found = projectors.state_dict()
    assert set(found) == set(stored) and all(torch.equal(found[k], stored[k]) for k in stored)
    attended, tokens = projectors.projected(torch.randn(2, 24, 4, 4))
    assert attended.shape == (2, 2, 64, 16) and tokens.shape == (2, 64, 32)


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [loop.learning_rate(step, 400, QUICK.lr) for step in range(400)]
    assert rates[0] == pytest.approx(QUICK.lr / 20) and max(rates) == QUICK.lr
    assert rates[-1] < QUICK.lr / 1000 and rates[19] == pytest.approx(QUICK.lr)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": 0}, "distill.steps: got 0; expected 1 or more"),
        ({"epochs": 3}, "distill: got steps 21 and epochs 3; expected one of them; set the other"),
        ({"steps": None}, "distill: got steps None and epochs None; expected one of them"),
        ({"weights": "balanced", "balance": 0.0}, "distill: got weights balanced with"),
        ({"labelled_share": 1.5}, "distill.labelled_share: got 1.5; expected below 1"),
        ({"lr": -1.0}, "distill.lr: got -1.0; expected above 0"),
    ],
)
def test_impossible_recipes_are_refused_with_the_value(change, message):
    with pytest.raises(UserError, match=message):
        parse(Distill, {"methods": [], "student": "resnet18", "steps": 21, **change}, "distill")


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"swap_p": 2}, "cakd.swap_p: got 2; expected 1 or less"),
        ({"dropout": 1.0}, "cakd.dropout: got 1.0; expected below 1"),
        ({"discriminator_lr": 0.0}, "cakd.discriminator_lr: got 0.0; expected above 0"),
    ],
)
def test_impossible_decisions_are_refused_with_the_value(kwargs, message):
    with pytest.raises(UserError, match=message):
        parse(CakdConfig, kwargs, "cakd")


def test_before_last_reads_the_normed_input_of_the_last_block(make, online, prepared, teacher_path):
    config = replace(QUICK, cakd=CakdConfig(layer="before_last"))
    cached, live = make("gl", config), build(config, "gl+pca", prepared, teacher_path, online)
    indices = cached.feed.views.indices(0)[0].cached
    whole = next(cached.feed.batches(0, stopwatch.Stopwatch()))
    vit, description = checkpoint.load(teacher_path)
    pixels = views.normalise(whole.views[-len(indices.rows) :], description["preprocess"])
    x = pixels
    states = []
    for block in vit.blocks[-2:]:
        block.register_forward_hook(lambda _, args, out: states.append((args[0], out)))
    with torch.no_grad():
        vit(x)
        expected = vit.blocks[-1].norm1(states[1][0])[:, 1:]
        before = vit.blocks[-2]
        packed = before.attn.qkv(before.norm1(states[0][0]))[:, 1:]
    torch.testing.assert_close(whole.teacher.h, expected)
    assert whole.teacher.qkv is None
    running = next(live.feed.batches(0, stopwatch.Stopwatch())).teacher
    torch.testing.assert_close(running.h, expected)
    torch.testing.assert_close(running.qkv.flatten(2), packed, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="layer: got before_last for 'cakd', which reads Q, K, V"):
        make("cakd", config)
    with pytest.raises(ValueError, match="got standardise true with layer before_last"):
        CakdConfig(layer="before_last", standardise=True)


def test_without_labels_or_teacher_nothing_can_be_trained(make):
    silent = replace(QUICK, cross_entropy=CrossEntropyConfig(weight=0.0))
    with pytest.raises(UserError, match="got 0 with method 'plain', which has no other loss"):
        make("plain", silent)
    figures = train_step(make("logits", silent), 0, stopwatch.Stopwatch())
    assert figures["logits"] > 0


def test_standardising_brings_the_target_to_unit_scale(make):
    config = replace(QUICK, cakd=CakdConfig(standardise=True))
    trainer = make("cakd", config)
    gl = trainer.objective.loss_terms["gl"]
    h = gl.mean + 3 * gl.std
    torch.testing.assert_close(gl.target(h), torch.full_like(h, 3.0))
    space = trainer.space
    assert TeacherSpace.of(space.described()).width == 32


def long_training(workers, digits, teacher_path, features, folder, **options):
    """A `stages.distill` of 400 epochs in a session of its own, once it has begun to train."""
    params = folder / "params.yaml"
    params.write_text(
        f"distill:\n  workers: {workers}\n  methods: [plain]\n  student: test_resnet\n  epochs: 400\n"
        "  student_kwargs: {channels: [8, 12, 16, 24], output_stride: 8}\n"
        "cache:\n  dtype: float32\n  views: 2\n"
    )
    command = [sys.executable, "-u", "-m", "stages.distill"]
    command += map(str, (digits, teacher_path, features, folder / "student", folder / "perf.json"))
    command += ["--method", "plain", "--work", str(folder / "work"), "--params", str(params)]
    return subprocess.Popen(
        command,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        **options,
    )


@pytest.mark.ci
@pytest.mark.parametrize("workers", [0, 1])
def test_a_signal_to_the_whole_group_saves_leaves_and_the_next_run_goes_on(
    workers, digits, teacher_path, features, tmp_path
):
    out, work = tmp_path / "student", tmp_path / "work"
    process = long_training(workers, digits, teacher_path, features, tmp_path)
    assert "distill plain" in process.stdout.readline()  # after 5 seconds of training
    os.killpg(process.pid, signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + 15
    assert "saved" in errors and "run again to resume" in errors and not out.exists()
    assert list(work.rglob("checkpoint.safetensors"))


def test_a_killed_worker_is_one_line(digits, teacher_path, features, tmp_path):
    process = long_training(1, digits, teacher_path, features, tmp_path)
    assert "distill plain" in process.stdout.readline()
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 2 and errors.count("\n") == 1, errors
    assert "distill.workers: one of 1 was killed" in errors and "run again to go on" in errors


@pytest.mark.ci
def test_without_shared_memory_for_a_worker_the_training_ends_with_one_line(
    digits, teacher_path, features, tmp_path
):
    def little():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))

    process = long_training(
        1, digits, teacher_path, features, tmp_path, preexec_fn=little, env=UNCOUNTED
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and errors.count("\n") == 1
    assert "distill.workers: no shared memory for a worker" in errors and "/dev/shm" in errors
