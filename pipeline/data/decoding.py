"""Any image file -> 8-bit RGB: the one decoder of the pipeline and of the bundle's runner.

A bundle carries a copy of this file: Python 3.8, NumPy and Pillow 9, nothing else.
"""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Nothing else is opened: EPS would start Ghostscript.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "DIB", "GIF", "TIFF", "PPM", "AVIF")
MAX_PIXELS = 2**27  # 0.5 GB in memory
BICUBIC = 3  # Pillow's number of the filter, the same in every version
ORIENTATION, PHOTOMETRIC, BITS = 0x0112, 0x0106, 0x0102  # tags of EXIF and TIFF
CROPS = {  # crop_mode, as timm names it -> `crop` in an artefact's metadata
    "center": "resize the shorter side, centre crop",
    "squash": "resize both sides, centre crop",
}
TRANSPOSE = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # EXIF orientation -> Pillow's method
ORIENTED_BY = ("exif", "Raw profile type exif", "XML:com.adobe.xmp", "xmp")
PNG = b"\x89PNG\r\n\x1a\n"
PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"tRNS", b"eXIf", b"IDAT", b"IEND")
MAX_PNG_BYTES = 2**30
SIGNATURES = (
    (PNG, "a damaged PNG"),
    (b"\xff\xd8\xff", "a damaged JPEG"),
    (b"GIF8", "a damaged GIF"),
    (b"version https://git-lfs", "a Git LFS pointer, not the image itself; run `git lfs pull`"),
    (b"\x00\x05\x16\x07", "an AppleDouble file, which macOS writes beside the image"),
    (b"\xff\x0a", "JPEG XL, which is not read; convert it to PNG or JPEG"),
    (b"\0\0\0\x0cJXL ", "JPEG XL, which is not read; convert it to PNG or JPEG"),
    (b"\0\0\0\x0cjP  ", "JPEG 2000, which is not read; convert it to PNG or JPEG"),
    (b"\xff\x4f\xff\x51", "JPEG 2000, which is not read; convert it to PNG or JPEG"),
    (b"8BPS", "a Photoshop document, which is not read; export it as PNG"),
    (b"%PDF", "a PDF document, which is not read; export it as PNG"),
    (b"PK\x03\x04", "a ZIP archive; unpack it"),
)
BRANDS = (
    ({b"avif", b"avis"}, "AVIF, which this Pillow cannot read; install pillow>=11.3"),
    (
        {b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"mif1", b"msf1"},
        "HEIC, which is not read; convert it to JPEG or PNG",
    ),
)


def decode(source: Path | BinaryIO) -> Image.Image:
    """Decode an image file completely, as a viewer shows it: upright; of several frames the first.

    `info["frames"]` is "several" where the file holds more than one. Raises ValueError: no format that is read
    (the message names what the file is), more than MAX_PIXELS; otherwise what Pillow raises.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _decode(source)
        except UnidentifiedImageError:
            failure: Exception = ValueError(what_it_is(_head(source, 4096)))
        except OSError as error:
            if isinstance(source, Path) and source.is_symlink() and not source.exists():
                raise ValueError(f"a link to {os.readlink(source)}, which is not there") from None
            if error.errno is not None:
                raise
            failure = error
        except Exception as error:
            failure = error
        # Metadata of a PNG that Pillow rejects (large, or damaged) is no reason to reject its pixels.
        if _head(source, len(PNG)) != PNG:
            raise failure
        try:
            return _decode(io.BytesIO(_without_metadata(_head(source, MAX_PNG_BYTES))))
        except Exception:
            raise failure from None


def what_it_is(head: bytes) -> str:
    """Name a file by its first bytes, where Pillow identified no image."""
    if not head.strip(b"\0"):
        return "nothing but zero bytes" if head else "empty, 0 bytes"
    for signature, name in SIGNATURES:
        if head.startswith(signature):
            return name
    if head[4:8] == b"ftyp":
        length = min(struct.unpack(">I", head[:4])[0], len(head))
        brands = {head[i : i + 4] for i in range(8, length, 4)}
        other = "a video or another ISO media file, which is not read"
        return next((name for known, name in BRANDS if brands & known), other)
    text = head.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith((b"<!doctype html", b"<html")):
        return "an HTML page, as a failed download leaves it; fetch it again"
    if text.startswith((b"<svg", b"<?xml")):
        return "SVG or other XML, which is not read; export it as PNG"
    return f"no format that is read here; it begins with {head[:8]!r}"


def _head(source: Path | BinaryIO, count: int) -> bytes:
    if isinstance(source, Path):
        with source.open("rb") as file:
            return file.read(count)
    source.seek(0)
    return source.read(count)


def _without_metadata(data: bytes) -> bytes:
    """Drop every chunk of a PNG but those that pixels, transparency and orientation need."""
    chunks, at = [PNG], len(PNG)
    while at + 12 <= len(data):
        length, kind = struct.unpack(">I4s", data[at : at + 8])
        chunk = data[at : at + 12 + length]
        sound = struct.pack(">I", zlib.crc32(chunk[4:-4])) == chunk[-4:]
        if kind in PIXEL_CHUNKS and (sound or kind[:1].isupper()):
            chunks.append(chunk)
        at += 12 + length
    return b"".join(chunks) + data[at:]


def _open(source: Path | BinaryIO) -> Any:
    Image.init()
    if not isinstance(source, Path):
        source.seek(0)
    image = Image.open(source, formats=[f for f in FORMATS if f in Image.OPEN])
    if image.width * image.height > MAX_PIXELS:
        image.close()
        raise ValueError(f"{image.width} x {image.height} pixels; allowed: {MAX_PIXELS} in all")
    return image


def _decode(source: Path | BinaryIO) -> Image.Image:
    image = _open(source)
    try:
        raw = image.tile[0][3] if image.format == "PNG" and image.tile else ""
        image.load()
        several = image.format not in ("JPEG", "MPO") and _has_frames(image)
        exact: Image.Image = upright(_exact(image, source, raw))
    except BaseException:
        image.close()
        raise
    if several:
        exact.info["frames"] = "several"
    return exact


def _has_frames(image: Any) -> bool:
    try:
        return bool(getattr(image, "is_animated", False))
    except Exception:  # a damaged second frame: the first one is what is read
        return True


def _exact(image: Any, source: Path | BinaryIO, raw: Any) -> Any:
    """Correct grey and 16-bit files where Pillow ignores WhiteIsZero, fewer than 16 bits or a transparent colour.

    `raw`: Pillow's name for how the pixels of a PNG are stored.
    """
    if image.mode.startswith("I;16") and image.format == "TIFF":
        bits = image.tag_v2.get(BITS, (16,))[0]
        values = np.asarray(image).astype(np.int64)
        if image.tag_v2.get(PHOTOMETRIC) == 0:
            values = 2**bits - 1 - values
        if bits < 16 or image.tag_v2.get(PHOTOMETRIC) == 0:
            return _with_info(Image.fromarray(_to_8_bits(values, 2**bits - 1)), image)
        return image
    clear = image.info.get("transparency")
    if image.format != "PNG" or clear is None:
        return image
    if raw == "RGB;16B":
        again = _open(source)
        tile = again.tile  # decoded again, with the low byte of each value
        low = tile[0]
        tile[0] = (
            low._replace(args="RGB;16L") if hasattr(low, "_replace") else (*low[:3], "RGB;16L")
        )
        values = np.asarray(image).astype(np.int64) * 256 + np.asarray(again)
        return _clear(image, (values == np.array(clear)).all(axis=2))
    if image.mode.startswith("I"):
        grey = Image.fromarray(_to_8_bits(np.asarray(image), 65535))
        return _clear(_with_info(grey, image), np.asarray(image) == clear)
    if raw in ("L;2", "L;4"):
        return _clear(image, np.asarray(image) == clear * (85 if raw == "L;2" else 17))
    return image


def _to_8_bits(values: NDArray[Any], top: int) -> NDArray[np.uint8]:
    scaled: NDArray[np.uint8] = (values.clip(0, top) * (255 / top)).round().astype(np.uint8)
    return scaled


def _with_info(image: Image.Image, like: Image.Image) -> Image.Image:
    image.info = {k: v for k, v in like.info.items() if k != "transparency"}
    return image


def _clear(image: Image.Image, clear: NDArray[np.bool_]) -> Image.Image:
    image = _with_info(image.copy(), image)
    image.putalpha(Image.fromarray(np.where(clear, 0, 255).astype(np.uint8)))
    return image


def upright(image: Image.Image) -> Image.Image:
    """Apply the EXIF orientation; nothing else of the metadata is read, so nothing else can be wrong in it."""
    try:
        value: Any = image.getexif().get(ORIENTATION, 1)
        value = int(value[0] if isinstance(value, (tuple, bytes)) else value)
    except Exception:  # Pillow raises whatever the bytes lead to; a viewer ignores the tag then
        return image
    if value not in TRANSPOSE:
        return image
    method: Any = TRANSPOSE[value]
    turned = image.transpose(method)
    turned.info = {k: v for k, v in image.info.items() if k not in ORIENTED_BY}
    return turned


def rgb(image: Image.Image) -> Image.Image:
    """Convert any PIL image to 8-bit RGB of its own size: upright, alpha on white, 16 bit scaled to 8.

    Raises ValueError: 32-bit pixels, which have no range of their own, unless they are integers of 16 bits.
    """
    image = upright(image)
    if image.mode == "F":
        raise ValueError("32-bit float pixels have no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        values = np.asarray(image)
        low, high = int(values.min()), int(values.max())
        if low < 0 or high > 65535:
            raise ValueError(
                f"32-bit integer pixels ({low} to {high}) have no defined range; save it with 8 or 16 bits"
            )
        image = Image.fromarray((values / 257).round().astype(np.uint8))
    if "A" in image.getbands() or "transparency" in image.info:
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba)
    return image.convert("RGB")


def square_rgb(
    image: Image.Image, size: int, crop_pct: float = 1.0, crop_mode: str = "center"
) -> NDArray[np.uint8]:
    """Convert any PIL image to (size, size, 3) uint8 RGB, as a network is evaluated on it (bicubic).

    center: the shorter side resized to size / crop_pct, the longer one cropped at the centre; squash: both sides
    resized, the shape given up. `crop_pct`: the share of each side that is kept. Raises ValueError as `rgb`.
    """
    image = rgb(image)
    sides = image.size if crop_mode == "squash" else (min(image.size),) * 2
    width, height = (side * crop_pct for side in sides)
    left, top = (image.width - width) * 0.5, (image.height - height) * 0.5
    filters: Any = BICUBIC
    box = (left, top, left + width, top + height)
    return np.asarray(image.resize((size, size), filters, box))


def square_for(image: Image.Image, preprocess: dict[str, Any]) -> NDArray[np.uint8]:
    """Convert any PIL image to what the preprocessing of an artefact asks for: (S, S, 3) uint8 RGB."""
    mode = next(mode for mode, text in CROPS.items() if text == preprocess["crop"])
    return square_rgb(image, int(preprocess["image_size"]), preprocess.get("crop_pct", 1.0), mode)
