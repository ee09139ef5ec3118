"""Gradient norms of the terms on the backbone, over that of the cross-entropy, and weights that balance them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

STEPS = 16  # whose norms set balanced weights


def backbone(student: nn.Module) -> list[nn.Parameter]:
    """The student's parameters without its classifier's."""
    head = {id(p) for p in student.get_classifier().parameters()}  # type: ignore[operator]
    return [p for p in student.parameters() if id(p) not in head]


def gradient_norms(losses: Mapping[str, Tensor], on: Sequence[nn.Parameter]) -> dict[str, float]:
    """Euclidean norm of the gradient of each unweighted loss on these parameters; the graph is retained."""
    norms = {}
    for name, loss in losses.items():
        gradients = torch.autograd.grad(loss, on, retain_graph=True, allow_unused=True)
        squares = [g.float().square().sum() for g in gradients if g is not None]
        norms[name] = torch.stack(squares).sum().sqrt().item() if squares else 0.0
    return norms


def ratios(norms: Mapping[str, float], weights: Mapping[str, float]) -> dict[str, float]:
    """`ratio_<loss>`: each weighted norm over the cross-entropy's; nothing where that is zero."""
    reference = norms["cross_entropy"] * (weights["cross_entropy"] or 1.0)
    if not reference:
        return {}
    others = (name for name in norms if name != "cross_entropy")
    return {f"ratio_{name}": norms[name] * weights[name] / reference for name in others}


class Balance(nn.Module):
    """Weights at which each loss's gradient norm is `ratio` of the unweighted cross-entropy's, by STEPS steps.

    The sums are buffers, so that a resumed training goes on with the same weights.
    """

    sums: Tensor
    count: Tensor

    def __init__(self, losses: Sequence[str], ratio: float) -> None:
        super().__init__()
        self.losses, self.ratio = tuple(losses), ratio
        self._final: dict[str, float] | None = None
        self.register_buffer("sums", torch.zeros(len(self.losses) + 1, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    @property
    def measuring(self) -> bool:
        """Whether the weights still change."""
        return self._final is None and bool(self.count < STEPS)

    def add(self, norms: Mapping[str, float]) -> None:
        """Add the norms of a step."""
        row = [norms["cross_entropy"], *(norms[name] for name in self.losses)]
        self.sums += torch.tensor(row, dtype=torch.float64, device=self.sums.device)
        self.count += 1

    def weights(self) -> dict[str, float]:
        """The weight of each loss; 0 for one that has no gradient on the backbone."""
        if self._final is not None:
            return self._final
        reference, *own = self.sums.tolist()
        pairs = zip(self.losses, own, strict=True)
        weights = {name: self.ratio * reference / norm if norm else 0.0 for name, norm in pairs}
        if not self.measuring:
            self._final = weights  # read once: later steps must not wait for the device
        return weights
