"""The projectors' shapes and the group map of eq. 5."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipeline.distill.kernels import winograd
from pipeline.distill.projectors import (
    GroupWiseLinear,
    PartiallyCrossAttention,
    on_grid,
    token_groups,
    tokens_of,
)


@pytest.mark.parametrize(
    ("grid", "sizes"),
    [
        ((14, 14), {16: 9, 8: 6, 4: 1}),
        ((7, 7), {16: 1, 12: 2, 9: 1}),
        ((8, 8), {16: 4}),
    ],
)
def test_groups_partition_the_grid_into_the_papers_sizes(grid, sizes):
    groups = token_groups(*grid)
    assert sorted(t for g in groups for t in g) == list(range(grid[0] * grid[1]))
    assert Counter(map(len, groups)) == sizes


def test_each_group_is_one_contiguous_4x4_neighbourhood():
    for group in token_groups(14, 14):
        rows, columns = {t // 14 for t in group}, {t % 14 for t in group}
        assert len(group) == len(rows) * len(columns)
        assert max(rows) // 4 == min(rows) // 4 and max(columns) // 4 == min(columns) // 4


def test_groups_and_their_tokens_run_along_the_rows():
    """The order in which a checkpoint holds the layers; a grid of 4 x 6 has a row of six tokens."""
    first, second = token_groups(4, 6)
    assert first[:5] == (0, 1, 2, 3, 6) and second == (4, 5, 10, 11, 16, 17, 22, 23)
    assert token_groups(8, 8)[1][0] == 4 and token_groups(8, 8)[2][0] == 32


def test_pca_projector_packs_q_k_v_per_head_and_token():
    projector = PartiallyCrossAttention(5, 3, 12, (4, 6))
    feature = torch.randn(2, 5, 4, 6)
    qkv = projector(feature)
    assert qkv.shape == (2, 24, 3, 3, 4)
    value = projector.v(feature)  # (B, D, h, w): head 1, width 2 is channel 1 * 4 + 2
    torch.testing.assert_close(qkv[:, 3 * 6 + 1, 2, 1, 2], value[:, 6, 3, 1])


def test_many_channels_are_reduced_before_the_3x3_convolutions():
    wide = PartiallyCrossAttention(300, 2, 8, (2, 2), reduce=256)
    narrow = PartiallyCrossAttention(256, 2, 8, (2, 2), reduce=256)
    assert wide.q.in_channels == narrow.q.in_channels == 256
    assert sum(1 for _ in wide.reduce.parameters()) == 3
    assert not list(narrow.reduce.parameters())


def test_group_wise_linear_has_a_layer_a_group():
    gl = GroupWiseLinear(channels=5, width=12, grid=(14, 14))
    assert gl.weight.shape == (16, 12, 5) and gl.bias.shape == (16, 12)


def test_tokens_run_row_by_row():
    feature = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert tokens_of(feature)[0, :, 0].tolist() == list(range(12))


def test_the_students_grid_is_convolved_and_then_brought_to_the_tokens_or_the_other_way_round():
    feature = torch.randn(2, 5, 4, 4)
    late = PartiallyCrossAttention(5, 3, 12, (8, 8))
    early = PartiallyCrossAttention(5, 3, 12, (8, 8), at="tokens")
    early.load_state_dict(late.state_dict())
    assert late(feature).shape == early(feature).shape == (2, 64, 3, 3, 4)
    resized = on_grid(late.q(feature), (8, 8)).flatten(2).mT.reshape(2, 64, 3, 4)
    torch.testing.assert_close(late(feature)[:, :, 0], resized)
    before = late.q(on_grid(feature, (8, 8))).flatten(2).mT.reshape(2, 64, 3, 4)
    torch.testing.assert_close(early(feature)[:, :, 0], before)


@pytest.mark.parametrize("grid", [(6, 8), (5, 7), (1, 2)])
def test_the_wide_convolution_of_a_cpu_is_that_of_torch(grid):
    """Outputs and all gradients, in float64; grids that tiles of two by two do not cover, too."""
    shapes = ((2, 3, *grid), (4, 3, 3, 3), (4,))
    values = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    mine = winograd.conv3x3(*values)
    exact = torch.nn.functional.conv2d(*values, padding=1)
    torch.testing.assert_close(mine, exact)
    upstream = torch.randn_like(exact)
    gradients = [torch.autograd.grad(out, values, upstream) for out in (mine, exact)]
    torch.testing.assert_close(*gradients)


def test_only_wide_convolutions_in_float32_on_a_cpu_are_computed_by_winograd():
    x, wide = torch.randn(1, 256, 8, 8), torch.randn(576, 256, 3, 3)
    assert winograd.pays(x, wide)
    digits = torch.randn(64, 24, 8, 8), torch.randn(192, 24, 3, 3)
    assert not winograd.pays(*digits), "the default chain keeps its bits"
    assert not winograd.pays(x[:, :, :4], wide)
    assert not winograd.pays(x.double(), wide.double())
    assert not winograd.pays(x.to("meta"), wide.to("meta"))
    with torch.autocast("cpu", torch.bfloat16):
        assert not winograd.pays(x, wide)


def test_q_k_and_v_are_within_rounding_by_either_convolution(monkeypatch):
    projector, feature = PartiallyCrossAttention(256, 4, 192, (8, 8)), torch.randn(2, 256, 8, 8)
    mine = projector(feature)
    monkeypatch.setattr(winograd, "pays", lambda *_: False)
    exact = projector(feature)
    assert mine.is_contiguous(), "tokens are not copied once more"
    assert not torch.equal(mine, exact), "the first took the other path"
    torch.testing.assert_close(mine, exact)
