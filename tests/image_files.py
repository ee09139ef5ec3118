"""Image files as cameras, scanners, phones and web servers write them, built byte by byte."""

from __future__ import annotations

import io
import struct
import zlib

import numpy as np
from PIL import Image, TiffImagePlugin

SIDE = 16
GREY = 100  # what the upper half of every image here becomes; the lower half is black


def chunk(kind: bytes, data: bytes) -> bytes:
    """A chunk of a PNG with its length and checksum."""
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(rows: list[bytes], depth: int, kind: int, *extra: bytes) -> bytes:
    """A PNG of SIDE x SIDE pixels from packed rows, `extra` chunks before the pixels."""
    head = struct.pack(">IIBBBBB", SIDE, SIDE, depth, kind, 0, 0, 0)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    start = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head)
    return start + b"".join(extra) + pixels + chunk(b"IEND", b"")


def tiff(values: np.ndarray, photometric: int, bits: int | None = None, order: str = "<") -> bytes:
    """An uncompressed grey TIFF; `values` as they are stored."""
    data = values.tobytes()
    size = bits or values.dtype.itemsize * 8
    entries = [(256, 3, SIDE), (257, 3, SIDE), (258, 3, size), (259, 3, 1), (262, 3, photometric)]
    entries += [(273, 4, 8), (277, 3, 1), (278, 3, SIDE), (279, 4, len(data))]
    out = (b"II*\0" if order == "<" else b"MM\0*") + struct.pack(order + "I", 8 + len(data)) + data
    out += struct.pack(order + "H", len(entries))
    for tag, kind, value in entries:
        padded = (value, 0) if kind == 3 else (value,)
        out += struct.pack(order + ("HHIHH" if kind == 3 else "HHII"), tag, kind, 1, *padded)
    return out + struct.pack(order + "I", 0)


def halves(top: int, bottom: int, dtype: str = "u1") -> np.ndarray:
    """(SIDE, SIDE): the upper half of one value, the lower half of another."""
    values = np.full((SIDE, SIDE), bottom, dtype)
    values[: SIDE // 2] = top
    return values


def plain(mode: str = "RGB") -> Image.Image:
    """Grey above black."""
    return Image.fromarray(halves(GREY, 0)).convert(mode)


def in_32_bits(top: int, bottom: int) -> bytes:
    """A grey TIFF of 32-bit integers."""
    return saved(Image.fromarray(halves(top, bottom, "i4")), "TIFF")


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    """What Pillow writes."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def exif(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    """An EXIF block of raw entries: tag, type, count, four bytes of value."""
    out = b"II*\0" + struct.pack("<IH", 8, len(entries))
    for tag, kind, count, value in entries:
        out += struct.pack("<HHI", tag, kind, count) + value
    return out + struct.pack("<I", 0)


TURNED = (0x112, 3, 1, struct.pack("<HH", 6, 0))  # shown turned by 90 degrees clockwise


def photo(*entries: tuple[int, int, int, bytes], kind: str = "JPEG") -> bytes:
    """A photograph stored lying, with EXIF entries of which one turns it upright."""
    lying = plain().transpose(Image.Transpose.ROTATE_90)
    quality = {} if kind == "PNG" else {"quality": 95, "lossless": True}
    block = exif(list(entries))
    if kind != "JPEG":
        return saved(lying, kind, exif=block, **quality)
    data, segment = saved(lying, kind, quality=95), b"Exif\0\0" + block
    return data[:2] + b"\xff\xe1" + struct.pack(">H", len(segment) + 2) + segment + data[2:]


def lying_tiff() -> bytes:
    """A TIFF stored lying, with the orientation and a resolution written as text."""
    tags = TiffImagePlugin.ImageFileDirectory_v2()
    tags[0x112], tags[0x132] = 6, "not a date"
    return saved(plain().transpose(Image.Transpose.ROTATE_90), "TIFF", tiffinfo=tags)


def with_segments(data: bytes) -> bytes:
    """A JPEG with a colour profile of 200 KB in pieces, XMP, a long comment and an unknown segment."""
    body = b"".join(
        b"\xff\xe2" + struct.pack(">H", 60016) + b"ICC_PROFILE\0" + bytes([i, 4]) + b"x" * 60000
        for i in (1, 2, 3, 4)
    )
    for marker, text in ((0xE1, b"http://ns.adobe.com/xap/1.0/\0<x"), (0xFE, b"c" * 65000)):
        body += bytes([0xFF, marker]) + struct.pack(">H", len(text) + 2) + text
    return data[:2] + body + data[2:]


def after_head(data: bytes, *chunks: bytes) -> bytes:
    """A PNG with chunks behind its header."""
    return data[:33] + b"".join(chunks) + data[33:]


LARGE = zlib.compress(b"x" * (2 << 20))
PLAIN_PNG = saved(plain(), "PNG")
XMP = b"XML:com.adobe.xmp\0"
BAD_SUM = chunk(b"tEXt", b"Comment\0hello")[:-4] + b"\0\0\0\0"
CLEAR = Image.new("RGBA", (SIDE, SIDE), (9, 9, 9, 0))  # a second frame, or all of an image


def grey16(clear: int | None = None, dtype: str = ">u2", top: int = GREY * 257) -> bytes:
    """A 16-bit grey PNG, with a transparent value where one is given."""
    extra = [] if clear is None else [chunk(b"tRNS", struct.pack(">H", clear))]
    return png([row.tobytes() for row in halves(top, 0, dtype)], 16, 0, *extra)


def colour16() -> bytes:
    """A 16-bit colour PNG: (1, 2, 3) is transparent and (1, 2, 4) is not, alike in their high bytes."""
    values = np.zeros((SIDE, SIDE, 3), ">u2")
    values[:] = (1, 2, 4)
    values[: SIDE // 2] = (1, 2, 3)
    clear = chunk(b"tRNS", struct.pack(">HHH", 1, 2, 3))
    return png([row.tobytes() for row in values], 16, 2, clear)


def few_bits(depth: int) -> bytes:
    """A grey PNG of fewer than 8 bits; its white upper half is named transparent."""
    full = b"\xff" * (SIDE * depth // 8)
    rows = [full] * (SIDE // 2) + [bytes(len(full))] * (SIDE // 2)
    return png(rows, depth, 0, chunk(b"tRNS", struct.pack(">H", 2**depth - 1)))


def twelve_bits() -> bytes:
    """A TIFF of 12 bits a pixel: two pixels in three bytes."""
    value = GREY * 4095 // 255
    pair = bytes([value >> 4, (value & 15) << 4 | value >> 8, value & 255])
    rows = np.frombuffer(pair * (SIDE // 2), "u1")
    return tiff(np.stack([rows] * (SIDE // 2) + [rows * 0] * (SIDE // 2)), 1, bits=12)


def palette(**options: object) -> bytes:
    """An indexed PNG whose last colour is transparent and stands below; the rest is grey."""
    indexed = Image.fromarray(halves(0, 1)).convert("P")
    indexed.putpalette([GREY, GREY, GREY, 0, 200, 0])
    return saved(indexed, "PNG", **options)


def white_below(data: bytes) -> tuple[bytes, int, int]:
    """The file with the values its halves become: grey, and white where it is transparent."""
    return data, GREY, 255


# name -> the file, and optionally the values of its halves where they are not GREY and 0
READ: dict[str, bytes | tuple[bytes, int, int]] = {
    "plain.png": PLAIN_PNG,
    "plain.jpg": saved(plain(), "JPEG", quality=95),
    "plain.bmp": saved(plain(), "BMP"),
    "plain.ppm": saved(plain(), "PPM"),
    "plain.pgm": saved(plain("L"), "PPM"),
    "plain.webp": saved(plain(), "WEBP", lossless=True),
    "PLAIN.JFIF": saved(plain(), "JPEG", quality=95),
    "a png named.jpg": PLAIN_PNG,
    "progressive.jpg": saved(plain(), "JPEG", quality=95, progressive=True),
    "cmyk.jpg": saved(plain("CMYK"), "JPEG", quality=95),
    "cmyk.tif": saved(plain("CMYK"), "TIFF", compression="tiff_lzw"),
    "trailing bytes.jpg": saved(plain(), "JPEG", quality=95) + b"\0" * 999,
    "exif: upright.jpg": photo(TURNED),
    "exif: resolution as text.jpg": photo(TURNED, (0x11A, 2, 4, b"72\0\0")),
    "exif: date as float.jpg": photo(TURNED, (0x132, 11, 1, struct.pack("<f", 1.5))),
    "exif: unknown unit.jpg": photo((0x128, 7, 3, b"abc\0"), TURNED),
    "exif: a type that does not exist.jpg": photo(TURNED, (0x132, 99, 7, b"abcd")),
    "exif: an offset beyond the end.jpg": photo(TURNED, (0x10F, 2, 99, b"\xff\xff\xff\x7f")),
    "exif: orientation as byte.jpg": photo((0x112, 1, 1, b"\x06\0\0\0")),
    "exif: orientation twice.jpg": photo((0x112, 3, 2, struct.pack("<HH", 6, 6))),
    "exif: orientation as long.jpg": photo((0x112, 4, 1, struct.pack("<I", 6))),
    "exif: odd.webp": photo(TURNED, (0x11A, 2, 4, b"72\0\0"), kind="WEBP"),
    "exif: odd.png": photo(TURNED, (0x11A, 2, 4, b"72\0\0"), kind="PNG"),
    "exif: odd.tif": lying_tiff(),
    "exif: broken.jpg": saved(plain(), "JPEG", quality=95, exif=b"Exif\0\0II*\0\xff\xff"),
    "exif: orientation of 0.jpg": saved(plain(), "JPEG", quality=95, exif=exif([(0x112, 3, 1, b"\0" * 4)])),
    "segments.jpg": with_segments(saved(plain(), "JPEG", quality=95)),
    "profile of 2 MB.png": after_head(PLAIN_PNG, chunk(b"iCCP", b"p\0\0" + LARGE)),
    "text of 2 MB.png": after_head(PLAIN_PNG, chunk(b"zTXt", b"Comment\0\0" + LARGE)),
    "xmp of 2 MB.png": after_head(PLAIN_PNG, chunk(b"iTXt", XMP + b"\1\0\0\0" + LARGE)),
    "many texts.png": after_head(PLAIN_PNG, *[chunk(b"zTXt", b"k\0\0" + zlib.compress(b"x" * 2**20))] * 70),
    "text with a wrong checksum.png": after_head(PLAIN_PNG, BAD_SUM),
    "profile that is none.png": after_head(PLAIN_PNG, chunk(b"iCCP", b"p\0\0garbage")),
    "no end.png": PLAIN_PNG[:-12],
    "grey of 16 bits.png": grey16(),
    "grey of 16 bits.tif": tiff(halves(GREY * 257, 0, "<u2"), 1),
    "grey of 16 bits, big-endian.tif": tiff(halves(GREY * 257, 0, ">u2"), 1, order=">"),
    "grey of 12 bits.tif": twelve_bits(),
    "grey of 16 bits in 32.tif": in_32_bits(GREY * 257, 0),
    "grey of 16 bits.pgm": b"P5 16 16 65535\n" + halves(GREY * 257, 0, ">u2").tobytes(),
    "0 is white, 8 bits.tif": tiff(halves(255 - GREY, 255), 0),
    "0 is white, 16 bits.tif": tiff(halves((255 - GREY) * 257, 65535, "<u2"), 0),
    "grey of 16 bits, clear.png": (grey16(GREY * 257), 255, 0),
    "grey of 16 bits, no pixel clear.png": grey16(GREY * 257 + 1),
    "colour of 16 bits, clear.png": (colour16(), 255, 0),
    "grey of 1 bit, clear.png": (few_bits(1), 255, 0),
    "grey of 2 bits, clear.png": (few_bits(2), 255, 0),
    "grey of 4 bits, clear.png": (few_bits(4), 255, 0),
    "palette, clear index.png": white_below(palette(transparency=1)),
    "palette, clear by a table.png": white_below(palette(transparency=b"\xff\0")),
    "palette, opaque.gif": saved(plain("P"), "GIF"),
    "all clear.png": (saved(CLEAR, "PNG"), 255, 255),
    "animated.gif": saved(plain("P"), "GIF", save_all=True, append_images=[CLEAR]),
    "animated.webp": saved(plain(), "WEBP", lossless=True, save_all=True, append_images=[CLEAR.convert("RGB")]),
    "animated.png": saved(plain(), "PNG", save_all=True, append_images=[CLEAR.convert("RGB")]),
    "pages.tif": saved(plain(), "TIFF", save_all=True, append_images=[CLEAR.convert("RGB")]),
    "two pictures of a phone.jpg": saved(plain(), "MPO", quality=95, save_all=True, append_images=[plain()]),
}  # fmt: skip
HEIC = struct.pack(">I", 24) + b"ftypheic\0\0\0\0mif1heic"
# name -> the file, and what the message says of it
REFUSED: dict[str, tuple[bytes, str]] = {
    "empty.jpg": (b"", "empty, 0 bytes"),
    "zeros.jpg": (bytes(4096), "nothing but zero bytes"),
    "text.png": (b"no image", "no format that is read here"),
    "phone.jpg": (HEIC + bytes(99), "HEIC, which is not read"),
    "new phone.heic": (struct.pack(">I", 20) + b"ftypmif1\0\0\0\0heix", "HEIC, which is not read"),
    "clip.png": (struct.pack(">I", 20) + b"ftypisom\0\0\0\0mp42", "a video"),
    "stream.jxl": (b"\xff\x0a\xfa\x1f", "JPEG XL, which is not read"),
    "box.jxl": (b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(20), "JPEG XL, which is not read"),
    "satellite.jp2": (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(20), "JPEG 2000, which is not read"),
    "pointer.jpg": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        "a Git LFS pointer, not the image itself; run `git lfs pull`",
    ),
    "._0.png": (b"\0\5\26\7\0\2\0\0Mac OS X        ", "an AppleDouble file"),
    "page.jpg": (b"\xef\xbb\xbf <!DOCTYPE html><p>404", "an HTML page"),
    "drawing.png": (b'<?xml version="1.0"?><svg/>', "SVG"),
    "layers.png": (b"8BPS\0\1", "a Photoshop document"),
    "scan.jpg": (b"%PDF-1.7", "a PDF document"),
    "packed.png": (b"PK\3\4", "a ZIP archive"),
    "cut.png": (PLAIN_PNG[:60], "truncated|damaged PNG|broken"),
    "head only.jpg": (b"\xff\xd8\xff\xe0\0\x10JFIF", "a damaged JPEG|[Tt]runcated"),
    "float.tif": (saved(Image.new("F", (9, 9), 0.5), "TIFF"), "32-bit float pixels"),
    "counts of 32 bits.tif": (
        in_32_bits(65536, 0),
        r"32-bit integer pixels \(0 to 65536\) have no",
    ),
    "heights of 32 bits.tif": (in_32_bits(9, -1), r"32-bit integer pixels \(-1 to 9\) have no"),
}
