"""3x3 convolution by Winograd's F(2x2, 3x3), for the wide convolution of Proj1 on a CPU, in plain torch.

Lavin & Gray, arXiv 1509.09308, section 4.1: Y = A^T [(G g G^T) * (B^T d B)] A. A tile of 2x2 outputs takes 16
products instead of 36, as 16 matrix products over all tiles and channels. Each transform is one product with a
constant matrix, so autograd has the gradients, with as many products saved.

Shapes: x (B, c, h, w), weight (D, c, 3, 3), T tiles of an image, ceil(h / 2) ceil(w / 2).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

INPUT = ((1.0, 0.0, -1.0, 0.0), (0.0, 1.0, 1.0, 0.0), (0.0, -1.0, 1.0, 0.0), (0.0, 1.0, 0.0, -1.0))
WEIGHT = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
OUTPUT = ((1.0, 1.0, 1.0, 0.0), (0.0, 1.0, -1.0, -1.0))
# From these sizes on, 3 D from 576, it took 0.59 to 0.93 of the CPU time of PyTorch's convolution on an AMD EPYC.
LEAST_WEIGHTS = 1 << 16
LEAST_POSITIONS = 49


def pays(x: Tensor, weight: Tensor) -> bool:
    """Whether the convolution takes less time so: on a CPU, in float32, with many channels on both sides."""
    return (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and not torch.is_autocast_enabled("cpu")
        and weight.shape[0] * weight.shape[1] >= LEAST_WEIGHTS
        and x.shape[2] * x.shape[3] >= LEAST_POSITIONS
    )


def conv3x3(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """As F.conv2d with a padding of 1: (B, D, h, w), in channels_last."""
    batch, channels, height, width = x.shape
    rows, columns = -(-height // 2), -(-width // 2)
    padding = (0, 0, 1, 2 * columns + 1 - width, 1, 2 * rows + 1 - height)
    tiles = F.pad(x.permute(0, 2, 3, 1), padding).unfold(1, 4, 2).unfold(2, 4, 2)
    inputs = _both_axes(INPUT, x) @ tiles.permute(4, 5, 0, 1, 2, 3).reshape(16, -1)
    weights = _both_axes(WEIGHT, x) @ weight.reshape(-1, 9).T
    # 16 products (B T, c) x (c, D)
    products = inputs.view(16, -1, channels) @ weights.view(16, -1, channels).mT
    outputs = _both_axes(OUTPUT, x) @ products.view(16, -1)
    maps = outputs.view(2, 2, batch, rows, columns, -1).permute(2, 3, 0, 4, 1, 5)
    maps = maps.reshape(batch, 2 * rows, 2 * columns, -1)[:, :height, :width] + bias
    return maps.permute(0, 3, 1, 2)


def _both_axes(matrix: tuple[tuple[float, ...], ...], like: Tensor) -> Tensor:
    """Kronecker square of a transform: over rows and columns of a tile at once."""
    one = torch.tensor(matrix, dtype=like.dtype, device=like.device)
    return torch.kron(one, one)
