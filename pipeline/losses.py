"""The losses that no method owns: the labels', and both sides of the discriminator's; all means (decision 7)."""

from __future__ import annotations

from typing import Literal

from torch import Tensor, nn
from torch.nn import functional as F

Adversarial = Literal["non-saturating", "saturating"]


def cross_entropy(logits: Tensor, labels: Tensor, labelled: float) -> Tensor:
    """Cross-entropy of the labelled images, summed, over `labelled`; logits (B, K), labels (B,), -1 for none.

    `labelled` is the labelled images a part of the step's batch has on average, so that the mean over the parts is
    the mean over the batch, however the labels fell. Zero, with a gradient of zero, where none is labelled.
    """
    total = F.cross_entropy(logits, labels, ignore_index=-1, reduction="sum")
    return total / labelled if labelled else total


def adversarial(
    discriminator: nn.Module, fake: Tensor, form: Adversarial = "non-saturating"
) -> Tensor:
    """The student's loss against D on h'_S (B, N, D), mean over tokens; D's parameters get no gradient.

    `saturating` is eq. 9, mean log(1 - D(fake)); `non-saturating` is mean -log D(fake) (decision 10).
    """
    flags = [p.requires_grad for p in discriminator.parameters()]
    discriminator.requires_grad_(False)
    try:
        score = discriminator(fake)
    finally:
        for parameter, flag in zip(discriminator.parameters(), flags, strict=True):
            parameter.requires_grad_(flag)
    if form == "saturating":
        return -F.softplus(score).mean()  # log(1 - sigmoid(s)) = -softplus(s)
    return F.softplus(-score).mean()  # -log sigmoid(s) = softplus(-s)


def discriminator(network: nn.Module, real: Tensor, fake: Tensor) -> tuple[Tensor, Tensor]:
    """L_MAD of eq. 8, mean(-log D(h_T) - log(1 - D(h'_S))), and D's accuracy; both inputs are detached here."""
    on_real, on_fake = network(real.detach()), network(fake.detach())
    loss = F.softplus(-on_real).mean() + F.softplus(on_fake).mean()
    accuracy = ((on_real > 0).float().mean() + (on_fake <= 0).float().mean()) / 2
    return loss, accuracy.detach()
