"""The tap rule of decision 4, on the grids that decide it."""

from __future__ import annotations

import pytest
import timm
import torch

from pipeline.core.errors import UserError
from pipeline.distill.projectors import on_grid
from pipeline.models.student import Taps, find_tap
from tests.conftest import CNN


def test_resnet50_at_224_px_is_tapped_at_layer3_as_the_authors_do():
    tap = find_tap(timm.create_model("resnet50"), 224, (14, 14))
    assert (tap.module, tap.channels, tap.grid) == ("layer3", 1024, (14, 14))


def test_a_deepest_stage_on_half_the_token_grid_is_tapped_and_resized():
    student = timm.create_model("test_resnet", num_classes=10, **CNN)
    tap = find_tap(student, 32, (8, 8))
    assert (tap.module, tap.grid) == ("layer4", (4, 4))
    assert on_grid(torch.randn(2, 24, 4, 4), tap.tokens).shape == (2, 24, 8, 8)


def test_a_shallow_map_is_never_taken_because_its_stride_fits():
    """At 32 px with patch 4 layer1 of a plain ResNet has the token grid; taking it would not reach the rest."""
    tap = find_tap(timm.create_model("resnet18", output_stride=8), 32, (8, 8))
    assert tap.module == "layer4"


def test_a_student_without_a_fine_enough_map_is_refused_with_its_grids():
    with pytest.raises(
        UserError, match=r"layer4 1x1 at 32 px; expected one of the last two .* the teacher's 64x64"
    ):
        find_tap(timm.create_model("resnet18"), 32, (64, 64))


def test_an_unknown_tap_is_refused_with_the_maps():
    with pytest.raises(
        UserError, match=r"got 'layer9', which ResNet does not have; did you mean 'layer\d'\?"
    ):
        find_tap(timm.create_model("resnet18"), 32, (8, 8), "layer9")


@pytest.mark.parametrize(
    "name",
    ["resnet18", "mobilenetv3_small_100", "efficientnet_lite0", "repvgg_a0", "convnext_atto"],
)
def test_the_tap_of_every_family_reaches_two_thirds_of_the_backbones_tensors(name):
    student = timm.create_model(name, num_classes=0)
    tap = find_tap(student, 128, (8, 8))
    with Taps(student, [tap.module]) as taps:
        student.train()(torch.randn(4, 3, 128, 128))
        taps.features[tap.module].square().mean().backward()
    reached = [p.grad is not None for p in student.parameters()]
    assert sum(reached) >= 0.66 * len(reached)  # 67 % efficientnet_lite0 to 96 % repvgg_a0
    assert tap.module in [f["module"] for f in student.feature_info][-2:]


def test_a_plain_resnet_at_32_px_is_refused_instead_of_tapped_where_little_is_taught():
    with pytest.raises(UserError, match=r"layer4 1x1 at .*8x8 tokens; set .*output_stride"):
        find_tap(timm.create_model("resnet18"), 32, (8, 8))


def test_the_tap_leaves_the_student_a_plain_timm_model():
    student = timm.create_model("test_resnet", **CNN)
    keys = set(student.state_dict())
    tap = find_tap(student, 32, (8, 8))
    with Taps(student, [tap.module]) as taps:
        student(torch.zeros(1, 3, 32, 32))
        assert taps.features[tap.module].shape == (1, 24, 4, 4)
    assert set(student.state_dict()) == keys
    assert not any(m._forward_hooks for m in student.modules())
