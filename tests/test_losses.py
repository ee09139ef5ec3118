"""Each loss term against its equation, and who gets a gradient from it."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional as F

from pipeline.distill import objective, robust
from pipeline.distill.robust import Discriminator


def cross_entropy(logits, labels, labelled):
    unmixed = objective.Targets(labels, labels, None, labelled)
    return objective.cross_entropy(logits, unmixed)


def test_cross_entropy_is_the_mean_over_labelled_images_only():
    logits = torch.randn(4, 3, requires_grad=True)
    labels = torch.tensor([2, -1, 0, -1])
    loss = cross_entropy(logits, labels, 2.0)
    expected = F.cross_entropy(logits[[0, 2]], labels[[0, 2]])
    assert loss.item() == pytest.approx(expected.item())
    loss.backward()
    assert logits.grad[[1, 3]].abs().sum() == 0


def test_cross_entropy_of_an_unlabelled_batch_is_zero():
    assert cross_entropy(torch.randn(2, 3), torch.tensor([-1, -1]), 0.0) == 0


def test_cross_entropies_of_the_parts_of_a_batch_add_up_to_that_of_the_batch():
    logits, labels = torch.randn(6, 3), torch.tensor([2, -1, -1, 0, 1, -1])
    whole = cross_entropy(logits, labels, 3.0)
    parts = [cross_entropy(logits[i::2], labels[i::2], 1.5) for i in range(2)]
    torch.testing.assert_close(sum(parts) / 2, whole)


def test_the_label_of_a_mixed_view_is_mixed_by_its_share():
    logits, labels, partners = torch.randn(3, 4), torch.tensor([0, 3, 1]), torch.tensor([2, 3, 0])
    shares = torch.tensor([0.25, 0.6, 1.0])
    targets = objective.Targets(labels, partners, shares, labelled=3.0)
    soft = shares[:, None] * F.one_hot(labels, 4) + (1 - shares[:, None]) * F.one_hot(partners, 4)
    for smoothing in (0.0, 0.2):
        expected = F.cross_entropy(logits, soft, label_smoothing=smoothing)
        torch.testing.assert_close(objective.cross_entropy(logits, targets, smoothing), expected)


def test_adversarial_term_leaves_the_discriminators_parameters_and_gradients_untouched():
    network = Discriminator(6)
    before = [p.detach().clone() for p in network.parameters()]
    fake = torch.randn(2, 3, 6, requires_grad=True)
    robust.adversarial(network, fake).backward()
    assert fake.grad.abs().sum() > 0
    assert all(p.grad is None and p.requires_grad for p in network.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_adversarial_forms_are_equation_9_and_its_non_saturating_twin():
    fake, score = torch.zeros(1), -5.0

    class Constant(torch.nn.Module):
        def forward(self, x):
            return x + score

    d = 1 / (1 + math.exp(-score))
    saturating = robust.adversarial(Constant(), fake, "saturating").item()
    assert saturating == pytest.approx(math.log(1 - d), rel=1e-5)
    assert robust.adversarial(Constant(), fake).item() == pytest.approx(-math.log(d), rel=1e-5)


def test_non_saturating_has_148_times_the_gradient_at_a_confident_discriminator():
    grads = []
    for form in ("non-saturating", "saturating"):
        fake = torch.full((1,), -5.0, dtype=torch.float64, requires_grad=True)
        robust.adversarial(torch.nn.Identity(), fake, form).backward()
        grads.append(abs(fake.grad.item()))
    assert grads[0] / grads[1] == pytest.approx(148, abs=1)


def test_discriminator_sees_detached_fakes_and_learns_to_tell_real_from_fake():
    torch.manual_seed(0)
    network = Discriminator(8)
    optimizer = torch.optim.Adam(network.parameters(), 1e-2)
    real = torch.randn(16, 4, 8) + 1
    fake = torch.randn(16, 4, 8, requires_grad=True)

    def parts():
        on_real = F.softplus(-network(real)).mean().item()
        return on_real, F.softplus(network(fake)).mean().item()

    before, first = parts(), robust.discriminator(network, real, fake)[0].item()
    for _ in range(60):
        loss, accuracy = robust.discriminator(network, real, fake)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    after = parts()
    assert fake.grad is None
    assert after[0] < before[0] and after[1] < before[1]
    assert first == pytest.approx(2 * math.log(2), abs=0.2)
    assert accuracy > 0.9


def test_discriminator_loss_is_equation_8():
    network, real, fake = Discriminator(8), torch.randn(2, 4, 8), torch.randn(2, 4, 8)
    d_real, d_fake = network(real).sigmoid(), network(fake).sigmoid()
    expected = (-d_real.log()).mean() + (-(1 - d_fake).log()).mean()
    assert robust.discriminator(network, real, fake)[0].item() == pytest.approx(
        expected.item(), rel=1e-5
    )
