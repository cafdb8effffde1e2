"""Strip a picture's file to what decides its pixels, and read the orientation that it states.

Pillow reads densities, comments and all of EXIF when it opens a PNG, TIFF or AVIF or turns a picture. It fails if these
are damaged, even if every pixel is intact. So they are removed first, and only the orientation is read. Nothing here
raises: damaged metadata count as absent, and a file of unknown structure stays as it is.
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
    """A picture's file, split into content and metadata."""

    content: bytes  # the file without metadata, or unchanged if its kind keeps them apart
    exif: bytes = b""  # the removed block
    xmp: bytes = b""  # the removed block


def strip_metadata(data: bytes) -> Stripped:
    """Remove the metadata of a PNG, TIFF or AVIF file; other files stay as they are."""
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        return _strip_png(data)
    if data[4:8] == b"ftyp":
        # The properties `irot` and `imir` turn an AVIF file, whatever its EXIF states. An item of another type is not
        # EXIF.
        return Stripped(re.sub(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", rb"\1skip", data, count=1, flags=re.DOTALL))
    directory = _Directory.first(data)
    return Stripped(data) if directory is None else Stripped(directory.strip(data), data)


def orientation_of(exif: bytes, xmp: bytes) -> int:
    """The orientation of a picture as EXIF numbers it: 1..8, where 1 is upright.

    EXIF is a TIFF structure, with or without the prefix of JPEG files. Without an orientation in it, XMP counts. Both
    may be empty.
    """
    while exif.startswith(b"Exif\0\0"):
        exif = exif[6:]
    directory = _Directory.first(exif)
    stated = 1 if directory is None else directory.orientation()
    if stated == 1 and (found := re.search(rb'tiff:Orientation(?:="|>)([1-8])', xmp)):
        stated = int(found[1])
    return stated


def turned(image: Image.Image, orientation: int) -> Image.Image:
    """Turn a picture upright."""
    return image if orientation == 1 else image.transpose(_TURNS[orientation])


def _cut(data: bytes, spans: Sequence[tuple[int, int]]) -> bytes:
    """Remove spans of bytes, given in order."""
    edges = [0, *(edge for span in spans for edge in span), len(data)]
    return b"".join(data[start:stop] for start, stop in zip(edges[::2], edges[1::2], strict=True)) if spans else data


def _strip_png(data: bytes) -> Stripped:
    """Drop the ancillary chunks, including further frames, except tRNS, which states transparency."""
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
            elif keyword == b"Raw profile type exif":  # from older versions of ImageMagick
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
    """Decode a block of an empty line, its name, its length, and hexadecimal digits."""
    digits = b"".join(text.split(b"\n")[3:])
    return bytes.fromhex(digits.decode()) if re.fullmatch(rb"(?:[0-9a-fA-F]{2})*", digits) else b""


class _Directory(NamedTuple):
    """The first directory of a TIFF structure (TIFF 6.0, section 2), or of a BigTIFF."""

    order: str  # byte order, as `struct` writes it
    big: bool  # a BigTIFF, with numbers of 8 bytes
    start: int  # position of its count of entries
    entries: list[tuple[int, bytes]]  # tag and bytes of each complete entry

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
        except struct.error:  # outside the block
            return None
        begin = start + struct.calcsize(count)
        stops = range(begin + width, min(begin + width * number, len(block)) + 1, width)
        entries = [block[stop - width : stop] for stop in stops]
        return cls(order, big, start, [(struct.unpack_from(f"{order}H", entry)[0], entry) for entry in entries])

    def orientation(self) -> int:
        """The orientation entry; 1 if it is missing or damaged."""
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
        """Keep the first picture only, and its entries that decide the pixels; in place."""
        kept = [entry for tag, entry in self.entries if tag in _PIXEL_TAGS]
        count, place = ("Q", "Q") if self.big else ("H", "I")
        none = struct.pack(self.order + place, 0)  # the place of the next picture
        table = struct.pack(self.order + count, len(kept)) + b"".join(kept) + none
        return data[: self.start] + table + data[self.start + len(table) :]
