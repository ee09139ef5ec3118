"""Every method: what defines it in its paper, what it reads, and that it trains."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from pipeline import teach
from pipeline.core.errors import UserError
from pipeline.distill.kernels.philox import Key
from pipeline.distill.methods import (
    affinity,
    at,
    crd,
    dkd,
    fitnet,
    irg,
    minilm,
    ofa,
    queue,
    rkd,
    rsd,
    table,
)
from pipeline.distill.methods.logits import divergence
from pipeline.distill.methods.table import (
    METHODS,
    TERMS,
    WITHOUT_LOSS,
    reads,
    terms_of,
)
from pipeline.distill.methods.term import Sizes, StudentOutputs, TeacherSpace
from pipeline.distill.trainer import build, train_step
from pipeline.models.student import StudentSpec, Tap
from pipeline.models.teacher import TeacherOutputs, load
from pipeline.store import policy, writing
from pipeline.training import stopwatch
from pipeline.training.compute import Compute
from tests.conftest import VIT
from tests.test_training import QUICK, loss_terms

B, K, C, E, H, D, SIDE = 6, 5, 7, 11, 2, 8, 3
N = SIDE * SIDE


def draw(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def sizes():
    space = TeacherSpace(H, D, torch.zeros(D), torch.ones(D))
    tap = Tap("layer", C, (SIDE, SIDE), (SIDE, SIDE))
    spec = StudentSpec(E, {"shallow": (4, (2 * SIDE, 2 * SIDE)), "layer": (C, (SIDE, SIDE))})
    return Sizes(K, spec, tap, (SIDE, SIDE), space, labels=torch.arange(40) % 4 - 1, views=2)


def seen(**changes):
    found = StudentOutputs(
        logits=draw(B, K, seed=1),
        embedding=draw(B, E, seed=2),
        feature=draw(B, C, SIDE, SIDE, seed=3),
        stages=[draw(B, 4, 2 * SIDE, 2 * SIDE, seed=9), draw(B, C, SIDE, SIDE, seed=4)],
        labels=torch.tensor([0, 4, -1, 2, -1, 1]),
        key=Key(7, torch.tensor([3, 10, 12, 40, 66, 79]), 5),
        progress=1.0,
    )
    return replace(found, **changes)


def taught(**changes):
    found = TeacherOutputs(
        draw(B, N, 3, H, D // H, seed=5),
        draw(B, N, D, seed=6),
        draw(B, K, seed=7),
        draw(B, D, seed=8),
    )
    return replace(found, **changes)


def test_logits_is_t_squared_kl_and_zero_at_agreement():
    student, teacher = draw(5, 4), draw(5, 4, seed=1)
    p, q = (teacher / 4).softmax(1), (student / 4).softmax(1)
    expected = 16 * (p * (p / q).log()).sum(1).mean()
    assert divergence(student, teacher, 4.0).item() == pytest.approx(expected.item())
    assert divergence(teacher, teacher, 4.0).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_dkd_adds_up_to_the_classic_divergence_where_beta_is_what_the_target_leaves(temperature):
    student, teacher, target = draw(B, K), draw(B, K, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    of_target, of_others = dkd.decoupled(student, teacher, target, temperature)
    left = 1 - (teacher / temperature).softmax(1)[torch.arange(B), target]
    classic = divergence(student, teacher, temperature)
    torch.testing.assert_close((of_target + left * of_others).mean(), classic)


def test_dkds_part_of_the_others_does_not_see_the_target():
    student, teacher, target = draw(B, K), draw(B, K, seed=1), torch.zeros(B, dtype=torch.long)
    shifted = student.clone()
    shifted[:, 0] += 3
    (a, b), (c, d) = (dkd.decoupled(s, teacher, target, 4.0) for s in (student, shifted))
    torch.testing.assert_close(b, d)
    assert not torch.allclose(a, c)


def test_a_hint_is_zero_where_the_regressor_meets_the_teacher():
    term = fitnet.Fitnet(fitnet.FitnetConfig(), sizes()).double()
    h = term.regressor(seen().feature).flatten(2).mT
    assert term(seen(), taught(h=h))["fitnet"] < 1e-30  # a square's rounding
    assert term(seen(), taught(h=h + 2))["fitnet"].item() == pytest.approx(4)


def test_attention_maps_know_no_scale_and_no_sign():
    term = at.At(at.AtConfig(), sizes())
    tokens = seen().feature.flatten(2).mT
    assert term(seen(), taught(h=-3 * tokens))["at"].item() == pytest.approx(0, abs=1e-30)
    moved = term(seen(), taught(h=tokens.roll(1, dims=1)))["at"]
    assert moved > 1e-3
    torch.testing.assert_close(at.attention_map(tokens).norm(dim=1), torch.ones(B).double())


def test_relations_are_the_same_for_a_turned_moved_and_scaled_embedding():
    embedding = draw(B, D)
    turned = 2.5 * embedding @ torch.linalg.qr(draw(D, D, seed=1))[0] + 3
    term = rkd.Rkd(rkd.RkdConfig(), sizes())
    same = term(seen(embedding=embedding), taught(pooled=turned))
    assert all(v.item() == pytest.approx(0, abs=1e-14) for v in same.values())
    bent = term(seen(embedding=embedding), taught(pooled=embedding**3))
    assert all(v > 1e-3 for v in bent.values())


def test_angles_are_cosines_at_the_middle_point():
    points = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]).double()
    found = rkd.angles(points)
    assert found[0, 1, 2].item() == pytest.approx(0)  # a right angle at the origin
    assert found[1, 0, 2].item() == pytest.approx(math.cos(math.pi / 4))
    assert rkd.distances(points).sum().item() == pytest.approx(6)  # six pairs of mean 1


def test_two_views_that_coincide_have_no_direction_and_no_gradient():
    """Rounding apart: without the mask the angle's gradient is some 1e9."""
    x = draw(B, D)
    x[1] = x[0] + 1e-9
    term, leaf = rkd.Rkd(rkd.RkdConfig(), sizes()), x.clone().requires_grad_()
    sum(term(seen(embedding=leaf), taught()).values()).backward()
    assert leaf.grad.abs().max() < 10
    same = torch.ones(B, D, requires_grad=True)
    sum(term(seen(embedding=same), taught()).values()).backward()
    assert torch.isfinite(same.grad).all()


def test_instance_graphs_are_the_same_for_turned_embeddings_of_any_width():
    embedding = draw(B, 4)
    wider = torch.cat((3 * embedding, torch.zeros(B, 4)), dim=1)
    term = irg.Irg(irg.IrgConfig(), sizes())
    same = term(seen(embedding=embedding), taught(pooled=wider, logits=seen().logits))
    assert all(v.item() == pytest.approx(0, abs=1e-12) for v in same.values())
    other = term(seen(embedding=embedding), taught(pooled=wider))
    assert other["irg_vertex"] > 0 and other["irg_transform"] > 0


def test_the_contrast_falls_as_pairs_of_one_image_agree_and_the_memory_follows():
    torch.manual_seed(0)
    term = crd.Crd(crd.CrdConfig(width=D, momentum=0.0), sizes()).double()
    term.embed_s, term.embed_t = torch.nn.Identity(), torch.nn.Identity()
    ours = F.normalize(draw(B, D), dim=1)
    losses = []
    for theirs in (ours, ours.roll(1, dims=0)):
        term.measured.zero_()
        for memory in (term.memory_s, term.memory_t):
            memory.copy_(F.normalize(draw(40, D, seed=9), dim=1))
            memory[seen().key.ids // 2] = theirs if memory is term.memory_t else ours
        losses.append(term(seen(embedding=ours), taught(pooled=theirs))["crd"].item())
    assert losses[0] < losses[1]
    torch.testing.assert_close(term.memory_s[seen().key.ids // 2], ours)
    twice = F.normalize(draw(2, D), dim=1)  # two views of one image
    term._remember(term.memory_s, twice, torch.tensor([8, 8]))
    torch.testing.assert_close(term.memory_s[8], F.normalize(twice.sum(0), dim=0))
    h = crd.critic(
        torch.tensor([-14.0, 0.0, 14.0]), torch.tensor(40.0).log(), math.log(0.4)
    ).sigmoid()
    assert h[1].item() == pytest.approx((1 / 40) / (1 / 40 + 0.4), rel=1e-5)
    assert (h > 0).all() and (h < 1).all() and (h.diff() > 0).all()


def test_negatives_are_a_function_of_seed_and_step():
    term = crd.Crd(crd.CrdConfig(), sizes())
    key, at = seen().key, seen().key.ids // 2
    assert torch.equal(term._negatives(key, at), term._negatives(key, at))
    assert not torch.equal(term._negatives(key, at), term._negatives(Key(7, key.ids, 6), at))
    assert term._negatives(key, at).shape == (B, 39)  # 16,384 asked for, 39 other images


def test_a_negative_is_no_view_of_the_anchors_image_and_not_of_its_shown_class():
    labels = torch.arange(40) % 4 - 1
    term = crd.Crd(crd.CrdConfig(), sizes())
    for step in range(20):
        at = torch.arange(40)
        negatives = term._negatives(Key(7, at, step), at)
        drawn = set()
        for anchor, others in zip(at.tolist(), negatives, strict=True):
            assert anchor not in others
            if labels[anchor] >= 0:
                assert (labels[others] != labels[anchor]).all()
            drawn |= set(others.tolist())
        assert drawn == set(range(40))


def test_a_queue_knows_no_difference_where_the_embeddings_point_alike_and_fills_in_turn():
    torch.manual_seed(0)
    term = queue.Queue(queue.QueueConfig(size=10), sizes()).double()
    turned = queue.queue_divergence(3 * draw(B, D), draw(B, D), draw(9, D, seed=3), 0.07)
    assert turned.item() == pytest.approx(0, abs=1e-12)
    assert queue.queue_divergence(draw(B, D, seed=1), draw(B, D), draw(9, D, seed=3), 0.07) > 0.1
    for step in range(3):
        theirs = draw(B, D, seed=step)
        term(seen(), taught(pooled=theirs))
    unit = F.normalize(theirs, dim=1)
    torch.testing.assert_close(term.stored[[2, 3, 4, 5, 6, 7]], unit)  # 12 to 18, of ten places
    assert term.position == 18
    before = term.stored.clone()
    term.eval()(seen(), taught())
    assert torch.equal(before, term.stored)


def test_affinities_know_no_rotation_no_scale_and_no_width():
    tokens = seen().feature.flatten(2).mT
    turn = torch.linalg.qr(draw(C, C, seed=1))[0]
    wider = torch.cat((4 * tokens @ turn, torch.zeros(B, N, 2)), dim=2)
    term = affinity.Affinity(affinity.AffinityConfig(), sizes())
    assert term(seen(), taught(h=wider))["affinity"].item() == pytest.approx(0, abs=1e-12)
    assert term(seen(), taught(h=wider.roll(1, dims=1)))["affinity"] > 0.03
    rows = affinity.log_affinities(tokens, 0.07).exp().sum(2)
    torch.testing.assert_close(rows, torch.ones_like(rows))


def test_ofa_with_gamma_1_is_the_teachers_cross_entropy_and_above_it_the_sure_count_more():
    student, teacher, target = draw(B, K), draw(B, K, seed=1), torch.tensor([0, 1, 2, 3, 4, 0])
    classic = F.cross_entropy(student, teacher.softmax(1))
    torch.testing.assert_close(ofa.enhanced(student, teacher, target, 1.0), classic)
    sure = 9 * F.one_hot(target, K).double()
    assert ofa.enhanced(student, sure, target, 2.0) > 2 * ofa.enhanced(student, sure, target, 1.0)


def test_ofa_hears_every_stage():
    term = ofa.Ofa(ofa.OfaConfig(), sizes()).double()
    stages = [v.requires_grad_() for v in seen().stages]
    term(seen(stages=stages), taught())["ofa"].backward()
    assert all(stage.grad.abs().sum() > 0 for stage in stages) and len(term.branches) == 2


def test_redundancy_is_zero_for_decorrelated_equal_embeddings_and_knows_no_scale():
    basis = torch.linalg.qr(draw(32, D + 1))[0]
    x = torch.linalg.qr(torch.cat((torch.ones(32, 1).double(), basis[:, :D]), 1))[0][:, 1:]
    assert rsd.suppressed(5 * x + 2, x, 0.01).item() == pytest.approx(0, abs=1e-2)
    same = x[:, :1].expand(32, D)
    assert rsd.suppressed(same, same, 0.01).item() == pytest.approx(0.01 * (D - 1) * D, rel=1e-2)
    assert rsd.suppressed(x.roll(1, dims=1), x, 0.01) > 0.9


def test_value_relations_know_no_rotation_and_agree_where_the_nets_do():
    v, turn = draw(B, H, N, 4), torch.linalg.qr(draw(4, 4, seed=1))[0]
    a, b = (minilm.relation(x, x) for x in (v, v @ turn))
    assert minilm.kl(a, b).item() == pytest.approx(0, abs=1e-12)
    term = minilm.Minilm(minilm.MinilmConfig(), sizes()).double()
    agreed = term.project(seen().feature).detach()
    found = term(seen(), taught(qkv=agreed))
    assert all(v.item() == pytest.approx(0, abs=1e-12) for v in found.values())


def test_an_unlabelled_image_is_held_against_the_teachers_answer():
    found = seen().targets(taught())
    expected = [0, 4, taught().logits[2].argmax(), 2, taught().logits[4].argmax(), 1]
    assert found.tolist() == [int(v) for v in expected]


@pytest.mark.parametrize("term", TERMS)
def test_a_term_reads_only_what_it_says(term):
    """What it does not name is missing; it still gives finite losses, and each has a weight."""
    kind, name = TERMS[term]
    made = kind(QUICK.of_term(name), sizes()).double()
    missing = {"logits": None, "qkv": None, "tokens": None, "pooled": None}
    given = taught()
    given = replace(
        given, **{"h" if n == "tokens" else n: None for n in missing if n not in kind.teacher}
    )
    student = {"embedding": "embedding", "tap": "feature", "stages": "stages"}
    mine = seen(**{f: None for n, f in student.items() if n not in kind.student})
    losses = made(mine, given)
    assert set(losses) == set(made.weights())
    assert all(torch.isfinite(v) for v in losses.values())


def test_a_sum_of_methods_is_a_method_with_the_terms_of_both():
    assert terms_of("cakd+logits") == ("pca", "gl", "adversarial", "trans", "logits")
    assert terms_of("gl+pca") == ("gl", "pca")
    assert terms_of("gl+pca+robust") == ("gl", "pca", "adversarial", "trans")
    assert terms_of("plain") == () and terms_of("plain+trans") == ("trans",)
    assert reads("logits+rkd", "teacher") == {"logits", "pooled"}
    assert set().union(*METHODS.values()) == {*TERMS, *WITHOUT_LOSS}


@pytest.mark.parametrize(
    ("method", "message"),
    [
        ("plane", "method: got 'plane'; did you mean 'plain'"),
        ("gl+lgits", "method: got 'gl\\+lgits', whose part 'lgits' is no method; did you mean"),
        ("cakd+gl", "with 'gl' twice; expected each part once; remove one"),
        ("robust", "whose discriminator reads h'_S of gl; expected gl in the sum; add gl"),
        ("control+logits", "expected nothing but trans beside control"),
    ],
)
def test_a_method_that_is_none_is_refused_with_the_reason(method, message):
    with pytest.raises(UserError, match=message):
        terms_of(method)


def test_a_store_without_the_embedding_is_refused_by_the_methods_that_read_it():
    table.check_stored("logits", {"mode": "on", "layout": "qkvh"})
    table.check_stored("rsd", {"mode": "on", "layout": "block_input"})
    table.check_stored("rsd", {"mode": "off", "layout": "qkvh"})
    with pytest.raises(UserError, match="got 'rsd', which reads the teacher's pooled embedding"):
        table.check_stored("rsd", {"mode": "on", "layout": "qkvh"})


SUMS = [*(m for m in METHODS if m != "robust"), "gl+pca", "gl+pca+robust", "cakd+logits"]


@pytest.mark.parametrize("method", SUMS)
def test_every_method_reaches_the_students_backbone_and_its_losses_fall(
    method, prepared, teacher_path, features
):
    trainer = build(QUICK, method, prepared, teacher_path, features)
    timer = stopwatch.Stopwatch()
    rows = [train_step(trainer, step, timer) for step in range(20)]
    assert all(math.isfinite(v) for row in rows for v in row.values())
    terms = loss_terms(trainer, 20)
    for name, loss in terms.items():
        trainer.student.zero_grad()
        loss.backward(retain_graph=True)
        reached = [
            p.grad is not None and bool(p.grad.abs().sum() > 0)
            for n, p in trainer.student.named_parameters()
            if not n.startswith("fc.")
        ]
        if name in trainer.objective.beside:
            assert not any(reached), name
        else:
            assert sum(reached) >= 0.8 * len(reached), name


class Reads(TorchDispatchMode):
    """Counts what makes the host wait for a device: scalars and sizes that are read from tensors."""

    WAITING = (
        "_local_scalar_dense",
        "nonzero",
        "equal",
        "is_nonzero",
        "masked_select",
        "_unique2",
        "unique_dim",
    )

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().removeprefix("aten::").partition(".")[0]
        if name in self.WAITING:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("method", SUMS)
def test_a_step_reads_no_scalar(method, prepared, teacher_path, features):
    config = replace(QUICK, steps=1000, clip_norm=1.0, compute=Compute(ema=0.9))
    trainer = build(config, method, prepared, teacher_path, features)
    timer = stopwatch.Stopwatch()
    train_step(trainer, 0, timer)
    reads = Reads()
    with reads:
        for step in range(1, 7):  # one of them is the discriminator's
            train_step(trainer, step, timer)
    assert reads.seen == []


@pytest.fixture(scope="module")
def knowing(prepared, tmp_path_factory):
    """A teacher that knows the digits, and its store: an ignorant one's answers are against the labels."""
    folder = tmp_path_factory.mktemp("knowing")
    config = teach.Teach("vit_tiny_patch16_224", kwargs=VIT, epochs=24)
    teach.teach(config, prepared, folder / "teacher", folder / "work")
    path = folder / "teacher" / "teacher.safetensors"
    live, cache = load(path), policy.Cache(views=2)
    writing.write(cache, prepared, live, folder / "store", folder / "work", lambda _: None)
    return path, folder / "store"


@pytest.mark.slow
@pytest.mark.parametrize("method", SUMS)
def test_two_hundred_steps_on_digits_bring_every_loss_down(method, prepared, knowing):
    config = replace(QUICK, steps=210)
    trainer = build(config, method, prepared, *knowing)
    timer = stopwatch.Stopwatch()
    rows = [train_step(trainer, step, timer) for step in range(200)]
    for name in rows[0]:
        if name.startswith(("discriminator", "ratio")) or name == "adversarial":
            continue  # two players: neither has to fall
        first, last = (
            sum(row[name] for row in part) / len(part) for part in (rows[:20], rows[-20:])
        )
        assert math.isfinite(last) and last < first, (name, first, last)
