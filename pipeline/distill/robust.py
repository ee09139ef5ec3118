"""Multi-view robust training: the student-only transform of eq. 7 and the discriminator of eq. 8."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import torch
from pydantic.dataclasses import dataclass
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.core.config import STRICT, Share
from pipeline.distill.kernels.philox import LOW, philox

KEY = 0x7472616E73  # of the numbers of Trans, apart from those of the swap masks

Adversarial = Literal["non-saturating", "saturating"]


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


@dataclass(frozen=True, config=STRICT)
class Trans:
    """Trans of eq. 7, on pixels only: no crop, no rotation, so tokens stay paired with pixels (decision 13).

    Contrast, JPEG, shot noise, pixelation and lines are left to the robust evaluation, which must be disjoint.
    """

    probability: Share = 0.5  # of an image to be transformed at all
    brightness: Share = 0.2  # shift of all channels together, up to this share of the range
    colour: Share = 0.2  # shift of each channel by itself, up to this share of the range
    patch: Share = 0.4  # largest side of the masked patch, share of the image's side
    noise: Share = 0.1  # largest standard deviation of Gaussian noise, share of the range

    def __call__(self, views: Tensor, seeds: Sequence[int]) -> Tensor:
        """uint8 views (B, 3, S, S) -> float views (B, 3, S, S) in [0, 255]; untouched images keep their values.

        `seeds` has one for each image, so that what becomes of it depends on no other image of the batch. On a GPU
        the numbers are others, drawn there for the whole batch at once.
        """
        pixels = views.float()
        batch, _, size, _ = pixels.shape
        if pixels.device.type == "cpu":
            drawn, noise = self._draw(seeds, size)
        else:
            drawn, noise = draw_at_once(torch.tensor(seeds, device=pixels.device), size)
        columns = iter(drawn.unbind(1))

        def uniform(*shape: int) -> Tensor:
            return torch.stack([next(columns) for _ in range(math.prod(shape))], 1).view(
                batch, *shape
            )

        transformed = uniform(1, 1, 1) < self.probability
        changed = pixels + 255 * self.colour * (2 * uniform(3, 1, 1) - 1)
        changed = changed + 255 * self.brightness * (2 * uniform(1, 1, 1) - 1)
        changed = changed + 255 * self.noise * uniform(1, 1, 1) * noise
        side = self.patch * uniform(1)
        low = uniform(2) * (1 - side)
        at = (torch.arange(size, device=pixels.device) + 0.5) / size
        inside = (at >= low[:, :, None]) & (at < (low + side)[:, :, None])  # (B, 2, S)
        mask = inside[:, 0, :, None] & inside[:, 1, None, :]
        mean = pixels.mean(dim=(2, 3), keepdim=True)
        changed = torch.where(mask[:, None], mean, changed)
        return torch.where(transformed, changed.clamp(0, 255), pixels)

    def _draw(self, seeds: Sequence[int], size: int) -> tuple[Tensor, Tensor]:
        """Nine uniform numbers an image (B, 9), the first decides; noise (B, 3, S, S) for transformed images."""
        drawn, noise = torch.empty(len(seeds), 9), torch.zeros(len(seeds), 3, size, size)
        generator = torch.Generator()
        for i, seed in enumerate(seeds):
            drawn[i] = torch.rand(9, generator=generator.manual_seed(seed))
            if self.noise and drawn[i].numpy()[0] < self.probability:
                noise[i] = torch.randn(3, size, size, generator=generator)
        return drawn, noise


def draw_at_once(seeds: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Nine uniform numbers (B, 9) and standard normal noise (B, 3, S, S) of seeds (B,) int64, on their device.

    By Philox, counted by (element, purpose, seed): a row depends on its own seed only. Noise by Box and Muller.
    """
    low, high = (seeds & LOW)[:, None], ((seeds >> 32) & LOW)[:, None]

    def uniforms(purpose: int, count: int) -> Tensor:
        element = torch.arange(-(-count // 4), device=seeds.device)[None]
        words = philox((element, torch.full_like(element, purpose), low, high), KEY)
        # 24 bits, the middle of each step: never 0, whose logarithm is infinite.
        return ((torch.stack(words, -1) >> 8) + 0.5).flatten(1)[:, :count].float() * 2.0**-24

    first, second = uniforms(1, 3 * size * size + 1).unfold(1, 2, 2).unbind(-1)
    radius, angle = (-2 * first.log()).sqrt(), 2 * math.pi * second
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], -1).flatten(1)
    return uniforms(0, 9), pairs[:, : 3 * size * size].unflatten(1, (3, size, size))


class Discriminator(nn.Sequential):
    """D of eq. 8, token-wise (decision 11): D -> 256 -> 64 -> 1, LeakyReLU 0.2, no batch norm; a logit a token."""

    def __init__(self, width: int) -> None:
        super().__init__(
            nn.Linear(width, 256),
            nn.LeakyReLU(0.2),
            nn.Linear(256, 64),
            nn.LeakyReLU(0.2),
            nn.Linear(64, 1),
        )
