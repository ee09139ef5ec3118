"""The recipe for somebody's images, where none was named: by their size, their labels and the machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

SMALL = 40  # pixels of the shorter side up to which the recipes of 32 px lose nothing
FEW = 0.5  # share of the images with a label, below which the others decide
PER_CLASS = 100  # labels a class that are few


@dataclass(frozen=True)
class Choice:
    """A recipe, the values that the images need beside it, and why, in a sentence."""

    recipe: str
    reason: str
    values: dict[str, dict[str, Any]] = field(default_factory=dict)  # section -> key -> value


def choose(images: int, labelled: int, classes: int, side: int, gpu: bool) -> Choice:
    """Choose for `images` images of which `labelled` have a label, of `side` pixels.

    Photographs on a GPU get the recipe that fine-tunes a pretrained ViT; on a CPU the small one at 64 px. Small
    images of which few show a label get that of few labels; the student sees every label there is.
    """
    share = labelled / images
    few = share < FEW or labelled < PER_CLASS * classes
    what = f"{images:,} images of {classes} classes, {side} px, {100 * share:.0f} % with a label"
    where = "a GPU" if gpu else "no GPU"
    if side <= SMALL and few:
        values = {"prepare": {"student_labels": "all", "val": 0.1}}
        return Choice("few-labels", f"{what}, {where}: small images with few labels", values)
    if gpu and side > SMALL:
        return Choice("imagefolder", f"{what}, {where}: photographs, a pretrained teacher")
    return Choice("imagefolder-mini", f"{what}, {where}: a small teacher from scratch at 64 px")
