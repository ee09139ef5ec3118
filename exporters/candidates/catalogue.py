"""The CNNs that are candidates for a student: families by name, and a network with its arguments.

A network is written as timm's name, with further arguments of `timm.create_model` after a colon:
`resnet18:output_stride=16`, `test_resnet:channels=[16,32,48,64],output_stride=8`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from io import StringIO
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from exporters.artifact.session import import_package
from pipeline.core.errors import UserError, nearest

# Small CNNs of timm in common use on edge devices, each family from small to large: what is measured by default.
FAMILIES: dict[str, tuple[str, ...]] = {
    "resnet": ("resnet10t", "resnet14t", "resnet18", "resnet34"),
    "mobilenetv3": ("mobilenetv3_small_050", "mobilenetv3_small_100", "mobilenetv3_large_100"),
    "mobilenetv4": (
        "mobilenetv4_conv_small_050",
        "mobilenetv4_conv_small",
        "mobilenetv4_conv_medium",
    ),
    "efficientnet_lite": ("efficientnet_lite0", "efficientnet_lite1"),
    "repvgg": ("repvgg_a0", "repvgg_a1"),
    "ghostnet": ("ghostnet_050", "ghostnet_100"),
    "regnet": ("regnetx_002", "regnety_004"),
    "fbnet": ("fbnetc_100",),
    "convnext": ("convnext_atto",),
}


@dataclass(frozen=True)
class Candidate:
    """A CNN of timm with its arguments; `name` is how it was written, by which it is shown."""

    name: str
    model: str
    kwargs: dict[str, Any] = field(default_factory=dict)

    @property
    def slug(self) -> str:
        """The name as the name of a file."""
        return re.sub(r"[^A-Za-z0-9_.-]+", "-", self.name).strip("-")


def candidates(names: Sequence[str], strides: Sequence[int] = ()) -> list[Candidate]:
    """The networks of `names`, of families and networks in any mixture, each once; all families without any.

    strides: each network with each of these output strides (timm's `output_stride`) instead of its own.
    Raises UserError: neither a family nor a network of timm, arguments not key=value; Unavailable: no timm.
    """
    import_package("timm", "exporters.candidates: timm", "`pip install -e '.[train]'`")
    listed = [one for name in names or FAMILIES for one in _named(name)]
    if strides:
        listed = [_strided(one, stride) for one in listed for stride in strides]
    return list({one.name: one for one in listed}.values())


def _named(name: str) -> Iterator[Candidate]:
    """The networks of a family, or the one network of that name."""
    if name in FAMILIES:
        yield from (Candidate(model, model) for model in FAMILIES[name])
        return
    model, colon, text = name.partition(":")
    _check_known(model, name)
    yield Candidate(name, model, _arguments(name, text) if colon else {})


def _check_known(model: str, name: str) -> None:
    """Raise UserError: neither a family nor a network of timm."""
    import timm

    if not timm.is_model(model):
        raise UserError(
            f"--students: got {name!r}, no network of timm {timm.__version__}; expected one of timm.list_models() "
            f"or a family; {nearest(model, FAMILIES)}"
        )


def _arguments(name: str, text: str) -> dict[str, Any]:
    """`channels=[8,16],output_stride=8` as a dict. Raises UserError: not key=value."""
    try:
        flow = re.sub(r"(^|,)\s*(\w+)=", r"\1\2: ", text)
        kwargs = YAML(typ="safe", pure=True).load(StringIO("{" + flow + "}"))
    except YAMLError:
        kwargs = None
    if not kwargs or None in kwargs.values():
        raise UserError(
            f"--students: got {name!r}; expected NAME:key=value,key=value, arguments of timm.create_model; "
            "correct it"
        )
    return dict(kwargs)


def _strided(one: Candidate, stride: int) -> Candidate:
    """The network with that output stride."""
    joint = "," if one.kwargs else ":"
    kwargs = {**one.kwargs, "output_stride": stride}
    return Candidate(f"{one.name}{joint}output_stride={stride}", one.model, kwargs)
