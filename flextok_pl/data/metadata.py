"""A picture's file without what does not decide its pixels, and the orientation that it states.

Pillow reads densities, comments and all of EXIF when it opens a PNG, TIFF or AVIF or turns a picture, and fails where
they are damaged though every pixel is there. So they are taken out first, and nothing but the orientation is read of
them. Nothing here raises: damaged metadata say nothing, and a file that cannot be followed stays as it is.
"""

from __future__ import annotations

import re
import struct
import zlib
from collections.abc import Sequence
from typing import NamedTuple

from PIL import Image

_ORIENTATION = 0x0112
_PIXEL_TAGS = frozenset(
    (*range(254, 260), 262, 266, 273, *range(277, 280), 284, 292, 293, 317, 320, *range(322, 326), 332, 334)
).union((*range(338, 342), 347, *range(512, 522), *range(529, 533), 50674))
"""Tags of a TIFF file that decide its pixels (TIFF 6.0, and what libtiff adds)."""

_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Stripped(NamedTuple):
    """A picture's file, taken apart."""

    content: bytes  # the file without metadata, or as it was where its kind holds them apart
    exif: bytes = b""  # the block that was taken out
    xmp: bytes = b""  # the block that was taken out


def strip_metadata(data: bytes) -> Stripped:
    """Take the metadata out of a PNG, TIFF or AVIF file; others stay as they are."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _strip_png(data)
    if data[4:8] == b"ftyp":
        # An AVIF file is turned by its properties `irot` and `imir`, whatever its EXIF states; an item of another type
        # is no EXIF.
        return Stripped(re.sub(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", rb"\1skip", data, count=1, flags=re.DOTALL))
    directory = _Directory.first(data)
    return Stripped(data) if directory is None else Stripped(directory.strip(data), data)


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """How to turn a picture, as EXIF numbers it: 1..8, of which 1 is not at all.

    EXIF is a TIFF structure, with or without the prefix of JPEG files; where it says nothing XMP counts. Both may be
    empty.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    directory = _Directory.first(exif)
    stated = 1 if directory is None else directory.orientation()
    if stated == 1 and (found := re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)):
        stated = int(found[1])
    return stated


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """A picture as it is to be seen."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _cut(data: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """The bytes outside some spans, which are in order."""
    edges = [0, *(edge for span in spans for edge in span), len(data)]
    return b"".join(data[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)) if spans else data


def _strip_png(data: bytes) -> Stripped:
    """Drops the ancillary chunks, further frames among them, but tRNS, which states what is transparent."""
    exif = xmp = b""
    spans, start = [], 8
    while start + 12 <= len(data):
        kind, stop = data[start + 4 : start + 8], start + 12 + int.from_bytes(data[start : start + 4], "big")
        if stop > len(data):
            break
        if kind[0] & 0x20 and kind != b"tRNS":  # in lower case: ancillary (PNG 1.2, 3.3)
            spans.append((start, stop))
            content = data[start + 8 : stop - 4]
            keyword, _, text = content.partition(b"\0")
            if kind == b"eXIf":
                exif = content
            elif keyword == b"XML:com.adobe.xmp":
                xmp = _png_text(kind, text)
            elif keyword == b"Raw profile type exif":  # of older versions of ImageMagick
                exif = exif or _raw_profile(_png_text(kind, text))
        start = stop
    return Stripped(_cut(data, spans), exif, xmp)


def _png_text(kind: bytes, text: bytes) -> bytes:
    """The text of a chunk after its keyword."""
    packed = kind == b"zTXt" or (kind == b"iTXt" and text[:1] == b"\1")
    if kind != b"tEXt":
        text = text[1:] if kind == b"zTXt" else text[2:].split(b"\0", 2)[-1]
    try:
        return zlib.decompressobj().decompress(text, 2**20) if packed else text
    except zlib.error:
        return b""


def _raw_profile(text: bytes) -> bytes:
    """A block written as an empty line, its name, its length, and hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    return bytes.fromhex(digits.decode()) if re.fullmatch(rb"(?:[0-9a-fA-F]{2})*", digits) else b""


class _Directory(NamedTuple):
    """The first directory of a TIFF structure (TIFF 6.0, section 2), or of a BigTIFF."""

    order: str  # of its bytes, as `struct` writes it
    big: bool  # whether it is a BigTIFF, with numbers of 8 bytes
    start: int  # where its count of entries lies
    entries: list[tuple[int, bytes]]  # tag and bytes of each that is complete

    @classmethod
    def first(cls, block: bytes) -> _Directory | None:
        order = {b"II*\0": "<", b"MM\0*": ">", b"II+\0": "<", b"MM\0+": ">"}.get(block[:4])
        if order is None:
            return None
        big = b"+" in block[2:4]
        place, count, width = ("Q", "Q", 20) if big else ("I", "H", 12)
        try:
            (start,) = struct.unpack_from(order + place, block, 8 if big else 4)
            (number,) = struct.unpack_from(order + count, block, min(start, len(block)))
        except struct.error:  # they lie outside
            return None
        begin = start + struct.calcsize(count)
        stops = range(begin + width, min(begin + width * number, len(block)) + 1, width)
        entries = [block[stop - width : stop] for stop in stops]
        return cls(order, big, start, [(struct.unpack_from(f"{order}H", entry)[0], entry) for entry in entries])

    def orientation(self) -> int:
        """What its entry of this name states; 1 where there is none, or a damaged one."""
        entry = next((entry for tag, entry in self.entries if tag == _ORIENTATION), None)
        if entry is None:
            return 1
        kind, count = struct.unpack_from(self.order + ("HQ" if self.big else "HI"), entry, 2)
        form = {1: "B", 3: "H", 4: "I"}.get(kind)
        if form is None or count != 1:
            return 1
        (value,) = struct.unpack_from(self.order + form, entry, 12 if self.big else 8)
        return value if value in _TURNS else 1

    def strip(self, data: bytes) -> bytes:
        """The file with its first picture only, and of that the entries that decide the pixels; in place."""
        kept = [entry for tag, entry in self.entries if tag in _PIXEL_TAGS]
        count, place = ("Q", "Q") if self.big else ("H", "I")
        none = struct.pack(self.order + place, 0)  # the place of the next picture
        table = struct.pack(self.order + count, len(kept)) + b"".join(kept) + none
        return data[: self.start] + table + data[self.start + len(table) :]
