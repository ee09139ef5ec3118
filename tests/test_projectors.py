"""The projectors' shapes and the group map of eq. 5."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from pipeline.projectors import GroupWiseLinear, PartiallyCrossAttention, token_groups, tokens_of


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


def test_pca_projector_packs_q_k_v_per_head_and_token():
    projector = PartiallyCrossAttention(channels=5, n_heads=3, width=12)
    feature = torch.randn(2, 5, 4, 6)
    qkv = projector(feature)
    assert qkv.shape == (2, 24, 3, 3, 4)
    value = projector.v(feature)  # (B, D, h, w): head 1, width 2 is channel 1 * 4 + 2
    torch.testing.assert_close(qkv[:, 3 * 6 + 1, 2, 1, 2], value[:, 6, 3, 1])


def test_many_channels_are_reduced_before_the_3x3_convolutions():
    wide = PartiallyCrossAttention(channels=300, n_heads=2, width=8, reduce=256)
    narrow = PartiallyCrossAttention(channels=256, n_heads=2, width=8, reduce=256)
    assert wide.q.in_channels == narrow.q.in_channels == 256
    assert sum(1 for _ in wide.reduce.parameters()) == 3
    assert not list(narrow.reduce.parameters())


def test_group_wise_linear_has_a_layer_a_group():
    gl = GroupWiseLinear(channels=5, width=12, grid=(14, 14))
    assert gl.weight.shape == (16, 12, 5) and gl.bias.shape == (16, 12)


def test_tokens_run_row_by_row():
    feature = torch.arange(12.0).reshape(1, 1, 3, 4)
    assert tokens_of(feature)[0, :, 0].tolist() == list(range(12))
