"""The option `--shape`, which fixes the dynamic axes of a foreign ONNX network's image input."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from exporters.artifact import onnx_file
from pipeline.core.errors import UserError

if TYPE_CHECKING:
    import onnx

Shape = tuple[int, int, int, int]


def add_shape_option(p: argparse.ArgumentParser) -> None:
    """Add --shape."""
    p.add_argument(
        "--shape",
        type=parse_shape,
        metavar="B,C,H,W",
        help="fix the dynamic input axes of an ONNX network, as 1,3,320,320; C is 3 (RGB) or 1 (grey)",
    )


def parse_shape(text: str) -> Shape:
    """`1,3,320,320` -> (1, 3, 320, 320). Raises ArgumentTypeError: not four whole numbers from 1 on."""
    if not re.fullmatch(r"\s*0*[1-9]\d{0,8}\s*(,\s*0*[1-9]\d{0,8}\s*){3}", text, re.ASCII):
        raise argparse.ArgumentTypeError(
            f"got {text!r}; expected batch, channels, height, width like 1,3,320,320"
        )
    batch, channels, height, width = (int(axis) for axis in text.split(","))
    return batch, channels, height, width


@contextmanager
def fixed_input(path: Path, shape: Shape | None) -> Iterator[Path]:
    """The ONNX file with its input fixed to `shape`: a copy of the same name that goes with the block.

    Without a shape, and for any other kind of artefact, it is `path` itself. Errors name `path`.
    Raises UserError: not an ONNX file of one image input, a fixed axis of another size.
    """
    if shape is None or path.suffix != ".onnx":
        yield path
        return
    with onnx_file.working_copy(path) as copy:
        proto = onnx_file.read_onnx(path)
        fix_input_shape(proto, shape, path)
        onnx_file.write_onnx(proto, copy)
        yield copy


def fix_input_shape(proto: onnx.ModelProto, shape: Shape, path: Path) -> None:
    """Set the dynamic axes of the image input, and every axis of the same symbol, to `shape`.

    Raises UserError: not one input of four axes, a fixed axis of another size.
    """
    graph = proto.graph
    weights = {w.name for w in graph.initializer}
    entries = [i for i in graph.input if i.name not in weights]
    axes = entries[0].type.tensor_type.shape.dim if len(entries) == 1 else []
    declared = [axis.dim_value if axis.HasField("dim_value") else None for axis in axes]
    what = f"--shape: got {','.join(map(str, shape))}, but {path}"
    if len(axes) != len(shape):
        raise UserError(
            f"{what} has {len(entries)} inputs, the first of {len(declared)} axes; expected one image input "
            "(B, C, H, W); leave --shape out"
        )
    if any(fixed not in (None, size) for fixed, size in zip(declared, shape, strict=True)):
        raise UserError(
            f"{what} declares {declared}; expected its fixed sizes; change only what is None there"
        )
    symbols = {axis.dim_param: size for axis, size in zip(axes, shape, strict=True)}
    symbols.pop("", None)
    for axis, size in zip(axes, shape, strict=True):
        axis.dim_value = size
    for value in (*graph.output, *graph.value_info):
        for axis in value.type.tensor_type.shape.dim:
            if axis.dim_param in symbols:
                axis.dim_value = symbols[axis.dim_param]
