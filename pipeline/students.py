"""A timm CNN and its tap: the feature map h_S (B, c, h, w) that the projectors read.

The student stays plain timm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.errors import UserError, nearest


@dataclass(frozen=True)
class Tap:
    """Where h_S is read: a module of the student, its channels and grid, and the teacher's token grid."""

    module: str
    channels: int
    grid: tuple[int, int]
    tokens: tuple[int, int]

    def resized(self, feature: Tensor) -> Tensor:
        """h_S (B, c, h, w) on the token grid, bilinear where the grids differ."""
        if feature.shape[-2:] == self.tokens:
            return feature
        return F.interpolate(feature, self.tokens, mode="bilinear", align_corners=False)


def find_tap(
    student: nn.Module, image_size: int, tokens: tuple[int, int], wanted: str = "auto"
) -> Tap:
    """The tap by the rule of decision 4, from one dry run.

    `auto`: the deepest map whose grid is at least the token grid, if it belongs to the last two stages; else the
    deepest of those two stages with at least half the token grid's side; never a shallower one, which the loss
    would leave the deep stages out of. `wanted` may name any module of timm's feature_info.
    Raises UserError: the model tells no feature maps, the name is unknown, no deep map is fine enough.
    """
    maps = _feature_maps(student, image_size)
    name = type(student).__name__
    if wanted != "auto":
        if wanted not in maps:
            raise UserError(
                f"distill.cakd.tap: {name} has no map {wanted!r}; {nearest(wanted, maps)}"
            )
        return Tap(wanted, *maps[wanted], tokens)
    deepest_first = list(reversed(maps.items()))
    for module, (channels, grid) in deepest_first[:2]:
        if min(grid) >= max(tokens):
            return Tap(module, channels, grid, tokens)
    for module, (channels, grid) in deepest_first[:2]:
        if 2 * min(grid) >= max(tokens):
            return Tap(module, channels, grid, tokens)
    sizes = ", ".join(f"{m} {h}x{w}" for m, (_, (h, w)) in maps.items())
    raise UserError(
        f"distill.student: at {image_size} px {name} has maps {sizes}; neither of the last two reaches half of "
        f"the teacher's {tokens[0]}x{tokens[1]} tokens; set distill.student_kwargs.output_stride, or a larger "
        "image_size"
    )


def _feature_maps(student: nn.Module, image_size: int) -> dict[str, tuple[int, tuple[int, int]]]:
    """module -> (channels, grid) of each map timm names, shallow to deep, measured by one dry run."""
    info: Any = getattr(student, "feature_info", None)
    if not info:
        raise UserError(
            f"distill.student: timm names no feature maps for {type(student).__name__}; choose a CNN whose "
            "`timm.create_model(name).feature_info` is not empty"
        )
    modules = [entry["module"] for entry in (info if isinstance(info, list) else info.info)]
    maps: dict[str, tuple[int, tuple[int, int]]] = {}
    with Taps(student, modules) as taps:
        was_training = student.training
        with torch.no_grad():
            student.eval()(torch.zeros(1, 3, image_size, image_size))
        student.train(was_training)
        for module in modules:
            feature = taps.features.get(module)
            if feature is not None and feature.dim() == 4:
                maps[module] = (feature.shape[1], (feature.shape[2], feature.shape[3]))
    return maps


class Taps:
    """Hooks that keep the output of named modules of the last forward pass in `features`; a context manager."""

    def __init__(self, student: nn.Module, modules: list[str]) -> None:
        self.features: dict[str, Tensor] = {}
        self._handles = [
            student.get_submodule(m).register_forward_hook(self._keep(m)) for m in modules
        ]

    def _keep(self, module: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.features[module] = output

        return hook

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.features.clear()
