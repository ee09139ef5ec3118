"""What defines OFD, ReviewKD, LONDON, AFD, AB, FT and DeiT, which the paper compares with, and ScaleKD."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from scipy import fft
from torch.nn import functional as F

from pipeline.core.errors import UserError
from pipeline.distill.methods import ab, afd, deit, ft, london, ofd, reviewkd, scalekd, table
from pipeline.distill.methods.term import TeacherSpace
from pipeline.distill.trainer import build, train_step
from pipeline.models.student import StudentSpec
from pipeline.training import stopwatch
from tests.test_methods import SIDE, B, C, D, N, draw, seen, sizes, taught
from tests.test_training import QUICK


def on_map(tokens):
    return tokens.mT.unflatten(2, (SIDE, SIDE))


def test_deit_is_the_cross_entropy_with_the_teachers_decision_and_sees_nothing_else_of_it():
    term = deit.Deit(deit.DeitConfig(), sizes())
    teacher, logits = taught().logits, seen().logits
    result = term(seen(), taught())["deit"]
    decided = teacher.argmax(1)
    by_hand = -logits.log_softmax(1)[torch.arange(B), decided].mean()
    torch.testing.assert_close(result, by_hand)
    torch.testing.assert_close(term(seen(), taught(logits=9 * teacher + 3))["deit"], result)
    assert term(seen(), taught(logits=-teacher))["deit"] != result


def test_boundaries_count_the_sign_of_the_teacher_and_the_margin_of_the_student():
    """A point on each side: (T, S) -> cost, mu 1."""
    costs = {
        (0.1, 1.0): 0.0,
        (0.1, 3.0): 0.0,
        (0.1, 0.5): 0.25,
        (0.1, -1.0): 4.0,
        (-0.1, -1.0): 0.0,
        (-0.1, -7.0): 0.0,
        (-0.1, 0.5): 2.25,
        (0.0, 0.5): 2.25,  # not active at 0
    }
    for (theirs, ours), cost in costs.items():
        pair = (torch.tensor([ours]), torch.tensor([theirs]))
        assert ab.boundary(*pair, margin=1.0).item() == pytest.approx(cost), (theirs, ours)
        assert ab.boundary(2 * pair[0], pair[1], 2.0).item() == pytest.approx(4 * cost)
    ours, theirs = draw(B, N, D), draw(B, N, D, seed=1)
    torch.testing.assert_close(ab.boundary(ours, theirs, 1.0), ab.boundary(ours, 5 * theirs, 1.0))


def test_ab_is_zero_where_the_connector_is_on_the_teachers_side():
    term = ab.Ab(ab.AbConfig(), sizes()).double()
    theirs = term.connector(seen().feature).flatten(2).mT.detach()
    with torch.no_grad():
        term.connector[1].weight.mul_(1e6)
    assert term(seen(), taught(h=theirs))["ab"] < 1e-3
    assert term(seen(), taught(h=-theirs))["ab"] > 1e3


def test_the_margin_is_the_mean_of_what_is_negative_in_a_channel():
    mean, std = torch.tensor([0.0, 1.0, -2.0, 5.0]), torch.tensor([1.0, 2.0, 0.5, 1.0])
    samples = mean + std * draw(400_000, 4).float()
    result = ofd.margins(mean, std)
    for channel in range(3):
        x = samples[:, channel]
        assert result[channel].item() == pytest.approx(x[x < 0].mean().item(), abs=0.02)
    assert result[0].item() == pytest.approx(-math.sqrt(2 / math.pi), rel=1e-5)
    assert result[3].item() == -3.0  # nothing is negative: three deviations
    zero, wide = torch.zeros(D), torch.full((D,), 2.0)
    term = ofd.Ofd(ofd.OfdConfig(), replace(sizes(), space=TeacherSpace(2, D, zero, wide)))
    torch.testing.assert_close(term.margin, ofd.margins(zero, wide))


def test_the_partial_distance_skips_a_student_below_a_target_that_is_not_positive():
    for ours, theirs, cost in (
        (-2.0, -0.5, 0.0),
        (-0.5, -0.5, 0.0),
        (0.5, -0.5, 1.0),
        (-0.2, -0.5, 0.09),
        (-2.0, 0.5, 6.25),
        (2.0, 0.5, 2.25),
        (-3.0, 0.0, 0.0),
    ):
        result = ofd.partial_l2(torch.tensor([ours]), torch.tensor([theirs])).item()
        assert result == pytest.approx(cost), (ours, theirs)


def test_ofd_holds_the_regressor_against_the_teacher_above_its_margin():
    term = ofd.Ofd(ofd.OfdConfig(), sizes()).double()
    ours = term.regressor(seen().feature).flatten(2).mT.detach()
    assert term(seen(), taught(h=ours))["ofd"].item() == pytest.approx(0, abs=1e-12)
    low, margin = taught(h=torch.full_like(ours, -9.0)), term.margin[0].item()
    assert margin == pytest.approx(-math.sqrt(2 / math.pi))
    above = (ours - margin).relu().square().mean()
    torch.testing.assert_close(term(seen(), low)["ofd"], above)
    high = ours.abs() + 1
    torch.testing.assert_close(term(seen(), taught(h=high))["ofd"], F.mse_loss(ours, high))


def test_channel_statistics_belong_to_the_last_layer():
    stored = {"mode": "on", "layout": "block_input"}
    table.check_stored("ofd", stored)
    table.check_stored("fitnet", stored, "before_last")
    for mode in ("on", "off"):
        with pytest.raises(UserError, match="got before_last for 'ofd\\+at', which uses channel"):
            table.check_stored("ofd+at", {**stored, "mode": mode}, "before_last")


def test_context_is_compared_at_every_scale_with_halved_weights():
    constant = torch.ones(2, 3, 8, 8, dtype=torch.float64)
    assert reviewkd.context_loss(3 * constant, constant).item() == pytest.approx(4)
    fine = draw(2, 3, 4, 2, 4, 2)
    fine = (fine - fine.mean((3, 5), keepdim=True)).flatten(4).flatten(2, 3)  # 2x2 blocks of mean 0
    whole = fine.square().mean()
    torch.testing.assert_close(reviewkd.context_loss(fine, 0 * fine), whole / 1.875)
    coarse = F.interpolate(draw(2, 3, 4, 4), size=8)
    levels = [F.adaptive_avg_pool2d(coarse, side).square().mean() for side in (8, 4, 2, 1)]
    by_hand = sum(level / 2**i for i, level in enumerate(levels)) / 1.875
    torch.testing.assert_close(reviewkd.context_loss(coarse, 0 * coarse), by_hand)
    small = draw(2, 3, 3, 3)  # 4x4 is finer than the map: 3, 2 and 1 remain
    levels = [F.adaptive_avg_pool2d(small, side).square().mean() for side in (3, 2, 1)]
    by_hand = (levels[0] + levels[1] / 2 + levels[2] / 4) / 1.75
    torch.testing.assert_close(reviewkd.context_loss(small, 0 * small), by_hand)


def test_fusion_is_a_sum_by_two_maps_of_weights():
    fusion = reviewkd.Fusion(4, 6, D, deepest=False).double()
    stage, deeper = draw(B, 4, SIDE, SIDE), draw(B, 6, SIDE, SIDE, seed=1)
    with torch.no_grad():
        fusion.attend.weight.zero_()
        for bias, own, other in (((50, -50), 1, 0), ((-50, 50), 0, 1), ((0, 0), 0.5, 0.5)):
            fusion.attend.bias.copy_(torch.tensor(bias))
            result, passed = fusion(stage, deeper)
            expected = own * fusion.reduce(stage) + other * deeper
            torch.testing.assert_close(passed, expected)
            torch.testing.assert_close(result, fusion.expand(expected))


def test_reviewkd_goes_from_the_deepest_stage_to_the_shallowest():
    """The shallowest output hears all stages, the deepest its own alone; every output is compared."""
    term = reviewkd.Reviewkd(reviewkd.ReviewkdConfig(), sizes()).double()
    outputs = []
    for fusion in term.fusions:
        fusion.register_forward_hook(lambda _, __, result: outputs.append(result[0]))
    stages = [stage.requires_grad_() for stage in seen().stages]
    loss = term(seen(stages=stages), taught())["reviewkd"]
    theirs = on_map(taught().h)
    torch.testing.assert_close(loss, sum(reviewkd.context_loss(o, theirs) for o in outputs))
    heard = [
        torch.autograd.grad(o.sin().sum(), stages, allow_unused=True, retain_graph=True)
        for o in outputs
    ]
    assert [[g is not None and bool(g.abs().sum() > 0) for g in row] for row in heard] == [
        [False, True],
        [True, True],
    ]


def test_the_power_method_gives_the_largest_singular_value_and_its_gradient():
    before, after = draw(B, N, 5), draw(B, N, 7, seed=1)
    leaves = [before.clone().requires_grad_(), before.clone().requires_grad_()]
    result = london.spectral_norm(leaves[0], after, 300)
    exact = torch.linalg.matrix_norm(leaves[1].mT @ after / N, ord=2)
    torch.testing.assert_close(result, exact)
    for leaf, value in zip(leaves, (result, exact), strict=True):
        value.sum().backward()
        assert leaf.grad.abs().sum() > 0
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


def test_london_compares_the_constants_of_values_and_tokens_with_those_of_two_stages():
    term = london.London(london.LondonConfig(iterations=300), sizes())
    values = taught().qkv[:, :, 2].flatten(2)
    theirs = torch.linalg.matrix_norm(values.mT @ taught().h / N, ord=2)
    shallow, deep = seen().stages
    pooled = F.avg_pool2d(shallow, 2).flatten(2)
    ours = torch.linalg.matrix_norm(pooled @ deep.flatten(2).mT / N, ord=2)
    result = term(seen(), taught())["london"]
    torch.testing.assert_close(result, ((ours - theirs) / theirs).square().mean())
    # The same constant from other features of the same images, twice the constant, and no common scale.
    scaled = term(seen(stages=[shallow, deep * (theirs / ours)[:, None, None, None]]), taught())
    assert scaled["london"].item() == pytest.approx(0, abs=1e-12)
    twice = taught(h=2 * taught().h)
    both = term(seen(stages=[shallow, 2 * deep]), twice)["london"]
    torch.testing.assert_close(both, result)


def test_london_needs_two_feature_maps():
    alone = replace(sizes(), spec=StudentSpec(5, {"features": (C, (SIDE, SIDE))}))
    with pytest.raises(UserError, match="feature map features alone for method london; expected"):
        london.London(london.LondonConfig(), alone)


def test_the_matching_is_a_sum_of_distances_by_attention():
    ours, theirs = draw(B, 2, N), draw(B, N, seed=1)
    each = [(ours[:, s] - theirs).square().mean(1) for s in range(2)]
    attention = draw(B, 2, seed=2).softmax(1)
    by_hand = (attention[:, 0] * each[0] + attention[:, 1] * each[1]).mean()
    torch.testing.assert_close(afd.matched(ours, theirs, attention), by_hand)
    only = torch.tensor([[0.0, 1.0]]).double().expand(B, 2)
    torch.testing.assert_close(afd.matched(ours, theirs, only), each[1].mean())


def test_afd_compares_the_energy_at_every_position_and_learns_which_stage_agrees():
    torch.manual_seed(0)
    term = afd.Afd(afd.AfdConfig(width=16), sizes()).double()
    stages = seen().stages
    attention = term.attention(stages, taught().h)
    torch.testing.assert_close(attention.sum(1), torch.ones(B).double())
    pooled = F.avg_pool2d(stages[0].square().mean(1), 2), stages[1].square().mean(1)
    ours = torch.stack([F.normalize(energy.flatten(1), dim=1) for energy in pooled], dim=1)
    theirs = F.normalize(taught().h.square().mean(2), dim=1)
    result = term(seen(), taught())["afd"]
    torch.testing.assert_close(result, afd.matched(ours, theirs, attention))
    agreeing = taught(h=-4 * pooled[1].sqrt().flatten(1)[:, :, None].expand(B, N, D))
    optimizer = torch.optim.Adam(term.parameters(), lr=0.02)
    for _ in range(60):
        optimizer.zero_grad()
        term(seen(), agreeing)["afd"].backward()
        optimizer.step()
    assert (term.attention(stages, agreeing.h)[:, 1] > 0.9).all()


def test_a_stages_score_is_a_bilinear_form_of_key_and_query_and_of_their_positions():
    torch.manual_seed(0)
    term = afd.Afd(afd.AfdConfig(width=16), sizes()).double()
    stages, tokens = seen().stages, taught().h
    query = term.query(tokens.mean(1))
    keys = [key(stage.mean((2, 3))) for key, stage in zip(term.keys, stages, strict=True)]
    keys = term.interact(torch.stack(keys, dim=1).flatten(0, 1)).unflatten(0, (B, 2))
    scores = [(keys[:, s] * query).sum(1) + term.position_t[0] @ term.position_s[s] for s in (0, 1)]
    by_hand = (torch.stack(scores, dim=1) / 4).softmax(1)  # 4 is the root of the width
    torch.testing.assert_close(term.attention(stages, tokens), by_hand)


def test_factors_are_compared_as_unit_vectors_of_an_image():
    ours, theirs = draw(B, 4, SIDE, SIDE), draw(B, 4, SIDE, SIDE, seed=1)
    assert ft.factor_distance(5 * theirs, theirs).item() == pytest.approx(0, abs=1e-12)
    pairs = zip(ours, theirs, strict=True)
    by_hand = sum((a / a.norm() - b / b.norm()).abs().sum() for a, b in pairs) / ours.numel()
    torch.testing.assert_close(ft.factor_distance(ours, theirs), by_hand)


def test_the_paraphraser_learns_from_the_teacher_alone_and_the_student_from_its_factors():
    term = ft.Ft(ft.FtConfig(), sizes()).double()
    feature = seen().feature.requires_grad_()
    losses = term(seen(feature=feature), taught())
    own = [*term.paraphrase.parameters(), *term.reconstruct.parameters()]
    others = [feature, *term.translate.parameters()]

    def reached(loss, on):
        result = torch.autograd.grad(losses[loss], on, retain_graph=True, allow_unused=True)
        return [g is not None and bool(g.abs().sum() > 0) for g in result]

    assert all(reached("ft", others)) and not any(reached("ft", own))
    assert all(reached("ft_reconstruction", own))
    assert not any(reached("ft_reconstruction", others))
    maps = on_map(taught().h)
    assert term.paraphrase(maps).shape == (B, D // 2, SIDE, SIDE)  # k = 0.5
    rebuilt = term.reconstruct(term.paraphrase(maps))
    torch.testing.assert_close(losses["ft_reconstruction"], (rebuilt - maps).square().mean())
    factors = term.paraphrase(maps), term.translate(feature)
    torch.testing.assert_close(losses["ft"], ft.factor_distance(factors[1], factors[0]))


def test_no_direct_component_is_what_a_cosine_transform_without_it_gives_back():
    tokens = draw(B, N, D)
    coefficients = fft.dctn(on_map(tokens).numpy(), axes=(2, 3))
    coefficients[:, :, 0, 0] = 0
    back = torch.from_numpy(fft.idctn(coefficients, axes=(2, 3))).flatten(2).mT
    torch.testing.assert_close(scalekd.without_direct(tokens), back)


def test_mimicry_compares_the_directions_of_tokens():
    """Two less twice the cosine, which no scale of a token changes."""
    ours, theirs = draw(B, N, D), draw(B, N, D, seed=1)
    cosines = F.cosine_similarity(ours, theirs, dim=2)
    torch.testing.assert_close(scalekd.mimicry(ours, theirs), (2 - 2 * cosines).mean())
    lengths = draw(B, N, 1, seed=2).abs() + 0.1
    assert scalekd.mimicry(lengths * theirs, theirs).item() == pytest.approx(0, abs=1e-12)


def test_scalekds_views_have_a_projector_each_and_the_second_knows_no_common_vector():
    torch.manual_seed(0)
    term = scalekd.Scalekd(scalekd.ScalekdConfig(), sizes()).double()
    feature, h = seen().feature, taught().h
    result, moved = term(seen(), taught()), term(seen(), taught(h=h + draw(1, 1, D, seed=3)))
    torch.testing.assert_close(result["scalekd"], scalekd.mimicry(term.whole(feature), h))
    views = [x - x.mean(1, keepdim=True) for x in (term.alternating(feature), h)]
    torch.testing.assert_close(result["scalekd_frequency"], scalekd.mimicry(*views))
    torch.testing.assert_close(result["scalekd_frequency"], moved["scalekd_frequency"])
    assert abs(result["scalekd"] - moved["scalekd"]) > 1e-3


def test_every_query_reads_all_positions_of_the_students_map():
    torch.manual_seed(0)
    project = scalekd.CrossAttention(C, D, N).double()
    with torch.no_grad():  # equal keys: every query reads the mean of the values
        project.attend.in_proj_weight[D : 2 * D] = 0
        project.attend.in_proj_bias[D : 2 * D] = 0
    feature = seen().feature.requires_grad_()
    result = project(feature)
    assert result.shape == (B, N, D)
    torch.testing.assert_close(result[:, 0], result[:, -1])
    read = project.reduce(feature).flatten(2).mT + project.position
    values = read @ project.attend.in_proj_weight[2 * D :].T + project.attend.in_proj_bias[2 * D :]
    x = project.norm(project.attend.out_proj(values.mean(1)))
    torch.testing.assert_close(result[:, 0], x + project.mlp(x))


def test_balanced_weights_leave_the_paraphraser_its_own(prepared, teacher_path, features):
    config = replace(QUICK, weights="balanced")
    trainer = build(config, "ft", prepared, teacher_path, features)
    before = [
        p.detach().clone() for p in trainer.objective.loss_terms["ft"].reconstruct.parameters()
    ]
    for step in range(3):
        figures = train_step(trainer, step, stopwatch.Stopwatch())
        assert "ratio_ft" in figures and "ratio_ft_reconstruction" not in figures
    weights = trainer.objective.weights(0.5)
    assert weights["ft_reconstruction"] == 1.0 and weights["ft"] != 500.0
    after = trainer.objective.loss_terms["ft"].reconstruct.parameters()
    assert all(not torch.equal(a, b) for a, b in zip(before, after, strict=True))
