"""The timm CNN student and where the methods read it: tap h_S (B, c, h, w), stages, input of the classifier.

Hooks read it; the student itself stays plain timm.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pydantic.dataclasses
import torch
from torch import Tensor, nn

from pipeline.core.config import STRICT
from pipeline.core.errors import UserError, nearest
from pipeline.models.checkpoint import first_line


@dataclass(frozen=True)
class StudentSpec:
    """Sizes of a student, from one dry run."""

    embedding: int  # width of the classifier's input
    maps: dict[str, tuple[int, tuple[int, int]]]  # module -> channels, grid; shallow to deep

    @property
    def stages(self) -> list[str]:
        """The modules of the last four feature maps, shallow to deep."""
        return list(self.maps)[-4:]

    @property
    def stage_channels(self) -> list[int]:
        """Their channels."""
        return [self.maps[module][0] for module in self.stages]


@pydantic.dataclasses.dataclass(frozen=True, config=STRICT)
class Tap:
    """Where h_S is read: a module of the student, its channels and grid, and the teacher's token grid."""

    module: str
    channels: int
    grid: tuple[int, int]
    tokens: tuple[int, int]


def find_tap(
    student: nn.Module,
    image_size: int,
    tokens: tuple[int, int],
    requested: str = "auto",
) -> Tap:
    """Choose the tap from one dry run (docs/decisions.md, 4).

    `auto`: the deepest map whose grid is at least the token grid, if it belongs to the last two stages; else the
    deepest of those two stages with at least half the token grid's side; never a shallower one, because the loss
    would not reach the stages behind it. `requested` may name any module of timm's feature_info.
    Raises UserError: a model without feature maps, an unknown name, no deep map that is fine enough.
    """
    spec = probe_student(student, image_size)
    check_feature_maps(student, spec)
    maps = spec.maps
    name = type(student).__name__
    if requested != "auto":
        if requested not in maps:
            raise UserError(
                f"distill.cakd.tap: got {requested!r}, which {name} does not have; {nearest(requested, maps)}"
            )
        return Tap(requested, *maps[requested], tokens)
    deepest_first = list(reversed(maps.items()))
    for module, (channels, grid) in deepest_first[:2]:
        if min(grid) >= max(tokens):
            return Tap(module, channels, grid, tokens)
    for module, (channels, grid) in deepest_first[:2]:
        if 2 * min(grid) >= max(tokens):
            return Tap(module, channels, grid, tokens)
    sizes = ", ".join(f"{m} {h}x{w}" for m, (_, (h, w)) in maps.items())
    raise UserError(
        f"distill.student: got {name} with feature maps {sizes} at {image_size} px; expected one of the last two "
        f"to have half the side of the teacher's {tokens[0]}x{tokens[1]} tokens; set "
        "distill.student_kwargs.output_stride, or a larger prepare.image_size"
    )


def probe_student(student: nn.Module, image_size: int) -> StudentSpec:
    """Describe a student by running it once on an image of zeros.

    Raises UserError: no classifier that timm names, or an image size that it does not take.
    """
    name, modules = type(student).__name__, list(_named_maps(student))
    maps: dict[str, tuple[int, tuple[int, int]]] = {}
    with Taps(student, modules) as taps:
        was_training = student.training
        device = next(student.parameters()).device
        try:
            with torch.no_grad():
                student.eval()(torch.zeros(1, 3, image_size, image_size, device=device))
        except Exception as error:  # a network raises whatever its layers raise
            raise UserError(
                f"distill.student: {name} does not take an RGB image of {image_size} px ({first_line(error)}); "
                "correct distill.student_kwargs, or set another prepare.image_size"
            ) from None
        student.train(was_training)
        for module in modules:
            feature = taps.features.get(module)
            if isinstance(feature, Tensor) and feature.dim() == 4:
                maps[module] = (feature.shape[1], (feature.shape[2], feature.shape[3]))
        return StudentSpec(taps.embedding.shape[1], maps)


def check_feature_maps(student: nn.Module, spec: StudentSpec) -> None:
    """Check that timm names a feature map of the student. Raises UserError: none, or none that is one tensor."""
    if not spec.maps:
        raise UserError(
            f"distill.student: got {type(student).__name__}, for which timm names no feature maps that are one "
            "tensor each; expected a CNN whose `timm.create_model(name).feature_info` names such modules; choose "
            "one, or methods that read none, such as logits"
        )


def _named_maps(student: nn.Module) -> dict[str, int]:
    """Return modules and channels of the feature maps that timm names, without names that are not modules."""
    info: Any = getattr(student, "feature_info", None) or []
    modules = dict(student.named_modules())
    entries = info if isinstance(info, list) else info.info
    return {e["module"]: e["num_chs"] for e in entries if e["module"] in modules}


class Taps:
    """Forward hooks that keep a student's features at named modules, and the input of its classifier.

    A context manager. `features` by module (B, c, h, w); `embedding` (B, e). Raises UserError: no classifier.
    """

    def __init__(self, student: nn.Module, modules: list[str]) -> None:
        self.features: dict[str, Tensor] = {}
        self.embedding = torch.empty(0)
        classifier = getattr(student, "get_classifier", lambda: None)()
        if not isinstance(classifier, nn.Module):
            raise UserError(
                f"distill.student: got {type(student).__name__}, for which timm names no classifier; choose "
                "another"
            )
        channels = _named_maps(student)
        self._handles = [
            student.get_submodule(m).register_forward_hook(self._keep(m, channels.get(m)))
            for m in modules
        ]
        self._handles.append(classifier.register_forward_pre_hook(self._keep_embedding))

    def _keep(self, module: str, channels: int | None) -> Any:
        def hook(_: nn.Module, __: Any, output: Tensor) -> None:
            self.features[module] = _channels_first(output, channels)

        return hook

    def _keep_embedding(self, _: nn.Module, args: tuple[Tensor, ...]) -> None:
        self.embedding = args[0].flatten(1)

    def __enter__(self) -> Taps:
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self.features.clear()


def _channels_first(feature: Any, channels: int | None) -> Any:
    """Permute (B, h, w, c) to (B, c, h, w) where only the last axis has timm's number of channels."""
    if not isinstance(feature, Tensor) or feature.dim() != 4 or feature.shape[1] == channels:
        return feature
    return feature.permute(0, 3, 1, 2) if feature.shape[3] == channels else feature
