"""Prepared images of their own shape: bytes, decoders, views a second: `python -m benchmarks.images FOLDER`.

CPU time of one core, the best of the turns, in which the rows take part one after the other. For the times images
are brought to the stored side, enlarged where they are smaller; bytes are of the images as they are, at several
sides.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torchvision
from PIL import Image

from benchmarks import record
from pipeline.core import artifacts, cli
from pipeline.core.errors import UserError
from pipeline.data import pixels, views
from pipeline.data.decoding import decode, rgb
from pipeline.data.images import image_files
from pipeline.data.pixels import Packed, Squares
from pipeline.data.prepared import spread

SCHEMA = "cakd.benchmark.images/1"
GEOMETRY = views.Geometry()
TURNED = views.Geometry(rotate=15)
NONE = np.array([], dtype=np.int64)  # nothing is mixed


def encoded_bytes(images: Sequence[Image.Image], size: int) -> list[dict[str, float]]:
    """Mean bytes an image, and a pixel, of each encoding, at shorter sides up to those of the images."""
    own = min(min(image.size) for image in images)
    sides = sorted({side for side in (own // 2, own * 3 // 4, own, size) if side <= own})
    rows = []
    for side in sides:
        reduced = [pixels.reduced(image, side) for image in images]
        count = sum(image.width * image.height for image in reduced)
        row = {"side": side, "raw": count * 3 / len(images)}
        for encoding in pixels.ENCODINGS:
            total = sum(len(pixels.encode(image, encoding)) for image in reduced)
            row |= {encoding: total / len(images), f"{encoding}_per_pixel": total / count}
        rows.append(row)
    return rows


def enlarged(image: Image.Image, side: int) -> Image.Image:
    """The image with a shorter side of `side` pixels."""
    scale = side / min(image.size)
    width, height = (round(length * scale) for length in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def milliseconds(
    parts: dict[str, Callable[[int], Any]], count: int, turns: int
) -> dict[str, float]:
    """CPU milliseconds a call of each part, over calls 0 to count - 1, the best of the interleaved turns."""
    best = dict.fromkeys(parts, float("inf"))
    for _ in range(turns):
        for name, part in parts.items():
            began = time.process_time()
            for number in range(count):
                part(number)
            best[name] = min(best[name], (time.process_time() - began) / count * 1000)
    return best


def measure(images: Sequence[Image.Image], size: int, turns: int) -> dict[str, Any]:
    """Times of decoders and views at `size` px."""
    torch.set_num_threads(1)
    side = pixels.default_stored_side(size)
    stored = [enlarged(image, side) for image in images]
    files = [pixels.encode(image, "jpeg") for image in stored]
    data = np.frombuffer(b"".join(files), np.uint8)
    packed = Packed(Path(pixels.PACKED_FILE), data, [len(f) for f in files], size, "center")
    squares = Squares(packed.squares(range(len(files))))
    tensors = [torch.frombuffer(bytearray(file), dtype=torch.uint8) for file in files]
    parts: dict[str, Callable[[int], Any]] = {
        "decode, Pillow": lambda i: np.asarray(Image.open(io.BytesIO(files[i]))),
        "decode, torchvision.io": lambda i: torchvision.io.decode_jpeg(tensors[i]),
        "view of squares": lambda i: views.view_batch(squares, GEOMETRY, 0, [i], [0], NONE),
        "view of packed": lambda i: views.view_batch(packed, GEOMETRY, 0, [i], [0], NONE),
        "view of packed, turned": lambda i: views.view_batch(packed, TURNED, 0, [i], [0], NONE),
        "whole image of packed": lambda i: packed.squares([i]),
        "encode": lambda i: pixels.encode(stored[i], "jpeg"),
    }
    return {"size": size, "stored_side": side, "ms": milliseconds(parts, len(files), turns)}


def table(result: dict[str, Any]) -> str:
    """The two tables."""
    lines = ["| shorter side | raw | JPEG, 95 | PNG | JPEG, a pixel |", "|--:|--:|--:|--:|--:|"]
    for row in result["bytes"]:
        lines.append(
            f"| {row['side']} px | {row['raw']:,.0f} | {row['jpeg']:,.0f} | {row['png']:,.0f} | "
            f"{row['jpeg_per_pixel']:.3f} |"
        )
    lines += ["", "Bytes an image, mean; the images as they are, reduced, never enlarged.", ""]
    lines += [
        f"| one core, {result['size']} px from {result['stored_side']} px | CPU ms | images a second |",
        "|---|--:|--:|",
    ]
    for name, ms in result["ms"].items():
        lines.append(f"| {name} | {ms:.2f} | {1000 / ms:,.0f} |")
    return "\n".join(lines)


def main(args: argparse.Namespace) -> None:
    """Measure, print, write `<out>.json` and `<out>.md`. Raises UserError: no images."""
    paths = image_files(args.folder)
    if not paths:
        raise UserError(
            f"{args.folder}: got no images; expected a folder of images; check the path"
        )
    images = [rgb(decode(paths[i])) for i in spread(np.arange(len(paths)), args.images)]
    result = {
        "images": len(images),
        "bytes": encoded_bytes(images, args.size),
        **measure(images, args.size, args.turns),
    }
    text = table(result)
    print(text)
    if args.out is not None:
        params = {"size": args.size, "images": args.images, "turns": args.turns}
        options = " ".join(f"--{key} {value}" for key, value in params.items())
        command = f"python -m benchmarks.images FOLDER {options}"
        record.write(args.out, SCHEMA, result, artifacts.provenance(params), command, text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    line = argparse.ArgumentParser(prog="benchmarks.images", description=__doc__)
    line.add_argument("folder", type=Path, help="any folder of images")
    line.add_argument("--size", type=int, default=224, help="pixels of the network")
    line.add_argument("--images", type=int, default=200)
    line.add_argument("--turns", type=int, default=5)
    line.add_argument("--out", type=Path, help="where to write, without suffix")
    return line


if __name__ == "__main__":
    cli.run(main, parser())
