"""The images of a folder, and the error for one that cannot be read. Torch-free."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from PIL import Image

from pipeline.core.errors import UserError
from pipeline.data import tree

Converted = TypeVar("Converted")

SUFFIXES = {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".dib", ".gif"}
SUFFIXES |= {".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".avif"}


class BrokenImage(UserError):
    """An image that cannot be decoded; under `prepare.on_error: skip` the run goes on without it."""

    def __init__(self, origin: str, reason: str, remedy: str = "repair or remove it") -> None:
        super().__init__(f"{origin}: not a readable image ({reason}); {remedy}")
        self.origin, self.reason = origin, reason


def read_pixels(
    read: Callable[[], Image.Image], origin: str, convert: Callable[[Image.Image], Converted]
) -> Converted:
    """Convert what `read` returns.

    Raises BrokenImage naming `origin`: missing, empty, truncated, no image, too large to be one.
    """
    try:
        with read() as image:
            return convert(image)
    except Exception as error:  # a decoder raises whatever the bytes lead it to
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise BrokenImage(origin, reason) from None


def image_files(folder: Path) -> list[Path]:
    """List the image files anywhere below `folder` by name, without hidden ones and those of a file manager."""
    if not folder.is_dir():
        return []
    files = (f for f in tree.walk(folder) if f.reason is None)
    return sorted(folder / f.name for f in files if Path(f.name).suffix.lower() in SUFFIXES)
