"""The two projectors from student to teacher space; they train beside the student and are then dropped.

Shapes: h_S (B, c, h, w) on the token grid, N = h w tokens, D = H d teacher width.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.distill.kernels import winograd

Groups = tuple[tuple[int, ...], ...]


class PartiallyCrossAttention(nn.Module):
    """Proj1 of eq. 1: three 3x3 convolutions, h_S -> packed qkv (B, N, 3, H, d).

    More than `reduce` channels are first brought down to `reduce` by 1x1 convolution + batch norm (decision 8).
    """

    def __init__(
        self,
        channels: int,
        n_heads: int,
        width: int,
        tokens: tuple[int, int],
        reduce: int = 256,
        at: Literal["tap", "tokens"] = "tap",
    ) -> None:
        super().__init__()
        self.n_heads, self.tokens, self.at = n_heads, tokens, at
        self.reduce: nn.Module = nn.Identity()
        if channels > reduce:
            self.reduce = nn.Sequential(
                nn.Conv2d(channels, reduce, 1, bias=False), nn.BatchNorm2d(reduce)
            )
            channels = reduce
        self.q, self.k, self.v = (nn.Conv2d(channels, width, 3, padding=1) for _ in range(3))

    def forward(self, feature: Tensor) -> Tensor:
        """h_S (B, c, h, w) on the student's own grid -> qkv (B, N, 3, H, d), one convolution for all three."""
        if self.at == "tokens":
            feature = on_grid(feature, self.tokens)
        x = self.reduce(feature)
        layers = (self.q, self.k, self.v)
        weight, bias = (
            torch.cat([layer.weight for layer in layers]),
            torch.cat([_bias(layer) for layer in layers]),
        )
        if winograd.pays(x, weight):
            maps = winograd.conv3x3(x, weight, bias)
        else:
            maps = F.conv2d(x, weight, bias, padding=1)
        maps = on_grid(maps, self.tokens)
        packed = maps.permute(0, 2, 3, 1)
        return packed.reshape(len(x), -1, 3, self.n_heads, len(bias) // (3 * self.n_heads))


def on_grid(maps: Tensor, tokens: tuple[int, int]) -> Tensor:
    """Maps (B, c, h, w) on the token grid, bilinear where the grids differ.

    In channels_last: a token's channels are contiguous, so `tokens_of` copies nothing.
    """
    maps = maps.contiguous(memory_format=torch.channels_last)
    if maps.shape[-2:] == tokens:
        return maps
    return F.interpolate(maps, tokens, mode="bilinear", align_corners=False)


def _bias(layer: nn.Conv2d) -> Tensor:
    assert layer.bias is not None
    return layer.bias


def token_groups(height: int, width: int, side: int = 4) -> Groups:
    """Tokens of each contiguous side x side neighbourhood of the grid, eq. 5: ceil(h/4) ceil(w/4) groups.

    14x14 gives 16 groups of 9x16, 6x8 and 1x4 tokens; 8x8 gives 4 of 16.
    """
    return tuple(
        tuple(
            y * width + x
            for y in range(top, min(top + side, height))
            for x in range(left, min(left + side, width))
        )
        for top in range(0, height, side)
        for left in range(0, width, side)
    )


class GroupWiseLinear(nn.Module):
    """Proj2 of eq. 5: one linear layer a group of tokens. Holds the weights; `kernels.gl_mse` applies them.

    weight (G, D, c), bias (G, D), initialised as nn.Linear is.
    """

    def __init__(self, channels: int, width: int, grid: tuple[int, int]) -> None:
        super().__init__()
        self.groups = token_groups(*grid)
        bound = 1 / math.sqrt(channels)
        shape = (len(self.groups), width)
        self.weight = nn.Parameter(torch.empty(*shape, channels).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def tokens_of(feature: Tensor) -> Tensor:
    """h_S (B, c, h, w) -> tokens (B, N, c), row by row as the teacher's patches."""
    return feature.flatten(2).mT
