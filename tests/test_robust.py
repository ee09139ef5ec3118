"""Trans of eq. 7 and the discriminator's shape."""

from __future__ import annotations

import pytest
import torch

from pipeline.core.config import parse
from pipeline.core.errors import UserError
from pipeline.distill import robust
from pipeline.distill.robust import Discriminator, Trans
from pipeline.training.seeds import step_seed


def seeds(n: int, first: int = 0) -> range:
    return range(first, first + n)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def views(n: int = 64) -> torch.Tensor:
    return torch.randint(0, 256, (n, 3, 16, 16), dtype=torch.uint8, generator=generator(9))


def test_trans_changes_about_half_of_the_images_and_leaves_the_others_exact():
    batch = views(400)
    changed = (Trans()(batch, seeds(400)) != batch.float()).flatten(1).any(1)
    assert 0.4 < changed.float().mean() < 0.6


def test_trans_is_a_function_of_each_images_seed_and_stays_in_range():
    batch = views()
    a, b, c = (Trans()(batch, seeds(64, first)) for first in (1, 1, 2))
    assert torch.equal(a, b) and not torch.equal(a, c)
    assert torch.equal(Trans()(batch[10:20], seeds(64, 1)[10:20]), a[10:20])
    assert a.min() >= 0 and a.max() <= 255


def test_trans_leaves_contrast_to_the_evaluation():
    """Shifts only: with noise and patch off, an image's deviation stays what it was where nothing clips."""
    batch = torch.randint(110, 146, (32, 3, 16, 16), dtype=torch.uint8, generator=generator(9))
    found = Trans(probability=1, noise=0, patch=0)(batch, seeds(32))
    torch.testing.assert_close(found.std(dim=(2, 3)), batch.float().std(dim=(2, 3)))


def test_trans_with_probability_0_is_the_identity():
    assert torch.equal(Trans(probability=0)(views(), seeds(64)), views().float())


def test_trans_moves_no_pixel():
    """A position-coded image with every colour change off but the patch: the rest stays where it was."""
    batch = torch.arange(256, dtype=torch.uint8).reshape(1, 1, 16, 16).expand(8, 3, 16, 16)
    found = Trans(probability=1, brightness=0, colour=0, noise=0)(batch, seeds(8))
    kept = found == batch.float()
    assert 0.5 < kept.float().mean() < 1


def test_numbers_drawn_at_once_are_uniform_and_normal_and_each_images_own():
    seeds_ = torch.tensor([step_seed(0, 3, f"trans {row}") for row in range(400)])
    drawn, noise = robust.draw_at_once(seeds_, 17)
    assert drawn.shape == (400, 9) and noise.shape == (400, 3, 17, 17)
    assert drawn.min() > 0 and drawn.max() <= 1
    assert (drawn.mean(0) - 0.5).abs().max() < 0.06 and (drawn.std(0) - 12**-0.5).abs().max() < 0.03
    assert abs(noise.mean()) < 0.01 and abs(noise.std() - 1) < 0.01
    assert abs((noise**4).mean() - 3) < 0.1  # the fourth moment of a normal number
    flat = noise.flatten(1)
    for lag in (1, 2, 3, 4, 17):
        assert abs((flat[:, :-lag] * flat[:, lag:]).mean()) < 0.01
    assert abs(torch.corrcoef(flat[:20]).triu(1)).max() < 0.2
    part, own = robust.draw_at_once(seeds_[7:9], 17)
    assert torch.equal(part, drawn[7:9]) and torch.equal(own, noise[7:9])


def test_trans_refuses_a_share_above_1():
    with pytest.raises(UserError, match=r"trans.patch: got 1.5; expected 1 or less"):
        parse(Trans, {"patch": 1.5}, "trans")


def test_the_discriminators_loss_sends_nothing_back_to_what_it_judges():
    real, fake = (torch.randn(2, 5, 12, generator=generator(s)).requires_grad_() for s in (0, 1))
    loss, _ = robust.discriminator(Discriminator(12), real, fake)
    loss.backward()
    assert real.grad is None and fake.grad is None


def test_discriminator_is_token_wise_with_three_layers():
    network = Discriminator(12)
    assert [m.out_features for m in network if isinstance(m, torch.nn.Linear)] == [256, 64, 1]
    x = torch.randn(2, 5, 12)
    torch.testing.assert_close(network(x)[:, 3], network(x[:, 3]))
