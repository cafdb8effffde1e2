"""Files of all kinds to pixels: damaged metadata, orientation wherever a file states it, rare levels, broken files."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageOps, TiffImagePlugin

from flextok_pl.data import ShardDataModule, write_folder
from flextok_pl.data.metadata import orientation_of, strip_metadata, turned
from flextok_pl.data.pictures import open_pictures
from flextok_pl.data.transforms import PictureError, decode_image, inspect_image

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 3), dtype=np.uint8)
ORIENTATIONS = range(1, 9)


def encoded(kind, **options):
    buffer = io.BytesIO()
    Image.fromarray(PIXELS).save(buffer, kind, **({"lossless": True} if kind == "WEBP" else {}), **options)
    return buffer.getvalue()


def directory(entries, order="<", start=8, big=False):
    """A TIFF structure: entries of tag, type, number of values, and their bytes."""
    count, place, header = ("Q", "Q", 16) if big else ("H", "I", 8)
    inline = struct.calcsize(place)
    behind = header + struct.calcsize(order + count) + len(entries) * (4 + 2 * inline) + inline
    table, blob = b"", b""
    for tag, kind, number, value in entries:
        field = value if len(value) <= inline else struct.pack(order + place, behind + len(blob))
        blob += value if len(value) > inline else b""
        table += struct.pack(f"{order}HH{place}", tag, kind, number) + field.ljust(inline, b"\0")
    mark = (b"II" if order == "<" else b"MM") + struct.pack(order + "H", 43 if big else 42)
    sizes = struct.pack(order + "HHQ", 8, 0, header) if big else struct.pack(order + "I", header)
    return mark + sizes + struct.pack(order + count, len(entries)) + table + bytes(inline) + blob


def tiff(strip, width, height, more=(), order="<", big=False, photometric=2, bits=(8, 8, 8), extra=()):
    """An uncompressed TIFF."""

    def short(*values):
        return struct.pack(f"{order}{len(values)}H", *values)

    entries = [
        (256, 3, 1, short(width)),
        (257, 3, 1, short(height)),
        (258, 3, len(bits), short(*bits)),
        (259, 3, 1, short(1)),
        (262, 3, 1, short(photometric)),
        (277, 3, 1, short(len(bits))),
        (278, 3, 1, short(height)),
        (279, 4, 1, struct.pack(f"{order}I", len(strip))),
        *([(338, 3, len(extra), short(*extra))] if extra else []),
        *more,
    ]
    place = len(directory([*entries, (273, 4, 1, bytes(4))], order, big=big))
    return directory(sorted([*entries, (273, 4, 1, struct.pack(order + "I", place))]), order, big=big) + strip


def chunk(kind, body):
    """A chunk of a PNG."""
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def png(depth, colour, row, width, transparent=b"", palette=b""):
    """A PNG of one row."""
    chunks = [chunk(b"IHDR", struct.pack(">IIBBBBB", width, 1, depth, colour, 0, 0, 0))]
    chunks += [chunk(kind, body) for kind, body in ((b"PLTE", palette), (b"tRNS", transparent)) if body]
    return b"".join([b"\x89PNG\r\n\x1a\n", *chunks, chunk(b"IDAT", zlib.compress(b"\0" + row)), chunk(b"IEND", b"")])


def exif(orientation, order="<", more=()):
    entries = [(0x0112, 3, 1, struct.pack(order + "H", orientation)), *more]
    return b"Exif\0\0" + directory(sorted(entries), order)


DAMAGED = {
    "ASCII XResolution": [(0x011A, 2, 5, b"many\0"), (0x0128, 3, 1, b"\2\0")],
    "NaN rational": [(0x011A, 5, 1, bytes(8)), (0x011B, 5, 1, bytes(8)), (0x0128, 3, 1, b"\3\0")],
    "EXIF directory nowhere": [(0x8769, 4, 1, b"\xff\xff\xff\x7f"), (0x8825, 4, 1, b"\xff\xff\0\0")],
    "unknown types": [(0x010F, 99, 3, b"abc"), (0x0110, 0, 2**31, b"abcd")],
}


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_entries_beside_the_orientation(what, kind):
    expected = np.asarray(turned(decode_image(encoded(kind)), 6))
    data = encoded(kind, exif=exif(6, more=DAMAGED[what]))
    assert np.array_equal(decode_image(data), expected)
    assert inspect_image(data) == (kind.lower(), (6, 9))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_no_damage_to_exif_touches_the_pixels(kind):
    plain = decode_image(encoded(kind))
    possible = {np.asarray(turned(plain, o)).tobytes() for o in ORIENTATIONS}
    whole = exif(1, more=[entry for entries in DAMAGED.values() for entry in entries])
    rng = np.random.default_rng(1)
    for _ in range(300):
        block = bytearray(whole if rng.random() < 0.8 else b"Exif\0\0" + rng.bytes(60))
        for at in rng.integers(6, len(block), rng.integers(1, 8)):
            block[at] = rng.integers(256)
        block = bytes(block[: rng.integers(6, len(block) + 1)])
        assert np.asarray(decode_image(encoded(kind, exif=block))).tobytes() in possible, block


@pytest.mark.parametrize("order", "<>")
@pytest.mark.parametrize("orientation", ORIENTATIONS)
def test_orientations_are_those_of_pillow(orientation, order):
    data = encoded("PNG", exif=exif(orientation, order))
    assert np.array_equal(decode_image(data), ImageOps.exif_transpose(Image.open(io.BytesIO(data))))


def xmp(orientation):
    return f'<x tiff:Orientation="{orientation}"/>'.encode()


def png_with(*chunks):
    data = encoded("PNG")
    return data[:33] + b"".join(chunk(kind, body) for kind, body in chunks) + data[33:]


PROFILE = b"\nexif\n      %d\n%s\n" % (len(exif(3)), exif(3).hex().encode())
STATED = {
    "XMP of a JPEG": encoded("JPEG", xmp=xmp(3)),
    "XMP of a WebP": encoded("WEBP", xmp=xmp(3)),
    "XMP of a PNG": png_with((b"iTXt", b"XML:com.adobe.xmp\0\0\0\0\0" + xmp(3))),
    "packed XMP of a PNG": png_with((b"iTXt", b"XML:com.adobe.xmp\0\1\0\0\0" + zlib.compress(xmp(3)))),
    "profile of ImageMagick": png_with((b"tEXt", b"Raw profile type exif\0" + PROFILE)),
    "packed profile": png_with((b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(PROFILE))),
    "prefix in a PNG": png_with((b"eXIf", exif(3))),
    "EXIF after a filler": b"\xff\xd8\xff" + encoded("JPEG", exif=exif(3))[2:],
    "a byte": encoded("WEBP", exif=directory([(0x0112, 1, 1, b"\3")])),
    "EXIF before XMP": encoded("JPEG", exif=exif(3), xmp=xmp(6)),
    "MPO": encoded("MPO", exif=exif(3), save_all=True, append_images=[Image.new("RGB", (9, 6))]),
}


@pytest.mark.parametrize("where", STATED)
def test_where_the_orientation_may_stand(where):
    plain = decode_image(encoded("JPEG" if STATED[where][:2] == b"\xff\xd8" else "PNG"))
    assert np.array_equal(decode_image(STATED[where]), turned(plain, 3))


@pytest.mark.parametrize(
    "block",
    [
        b"",
        b"II*\0",
        b"II*\0\xff\xff\xff\xff",
        b"II+\0" + b"\xff" * 30,
        directory([(0x0112, 2, 2, b"6\0")]),
        directory([(0x0112, 3, 2, b"\6\0\6\0")]),
        directory([(0x0112, 3, 1, b"\x09\0")]),
        directory([(0x0112, 3, 1, b"\6\0")])[:20],
    ],
)
def test_a_damaged_orientation_is_none(block):
    assert orientation_of(block, b"") == 1
    assert orientation_of(block, b'tiff:Orientation="9"') == 1


@pytest.mark.parametrize("order, big", [("<", False), (">", False), ("<", True)])
def test_metadata_of_a_tiff(order, big):
    turn = (0x0112, 3, 1, struct.pack(order + "H", 6))
    strip = PIXELS.tobytes()
    assert np.array_equal(decode_image(tiff(strip, 9, 6, order=order, big=big)), PIXELS)
    rng = np.random.default_rng(2)
    for _ in range(100):
        tags = rng.choice(
            [270, 282, 283, 296, 305, 330, 700, 33432, 33723, 34377, 34665, 34675, 34853], 3, replace=False
        )
        more = [
            (int(t), int(rng.integers(16)), int(rng.choice([0, 1, 9, 99])), rng.bytes(rng.choice([2, 40])))
            for t in tags
        ]
        data = tiff(strip, 9, 6, [turn, *more], order, big)
        assert np.array_equal(decode_image(data), turned(Image.fromarray(PIXELS), 6)), more


def test_metadata_of_an_avif():
    """Its EXIF is neither needed nor read: turned by its own properties alone, as everywhere."""
    pytest.importorskip("PIL._avif")
    plain = decode_image(encoded("AVIF", quality=100))
    data = encoded("AVIF", quality=100, exif=exif(6, more=DAMAGED["NaN rational"]))
    assert b"Exif" in data and np.array_equal(decode_image(data), turned(plain, 6))
    rubbish = data.replace(b"II*\0\x08", b"??*\0\x99")
    assert rubbish != data and np.array_equal(decode_image(rubbish), turned(plain, 6))


def test_pictures_without_metadata_are_not_copied():
    for data in (encoded("JPEG"), encoded("PNG"), encoded("WEBP"), b"", b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n\xff\xff"):
        assert strip_metadata(data).content is data


def test_conversion_and_reading_of_damaged_metadata(tmp_path):
    (tmp_path / "src").mkdir()
    for kind, ending in (("JPEG", "jpg"), ("PNG", "png"), ("WEBP", "webp")):
        (tmp_path / "src" / f"{kind}.{ending}").write_bytes(
            encoded(kind, exif=exif(6, more=DAMAGED["ASCII XResolution"]))
        )
    index = write_folder(tmp_path / "src", tmp_path / "dst", num_workers=0, on_error="skip")["all"]
    assert index.num_samples == 3 and index.provenance["skipped"] == 0
    (batch,) = ShardDataModule(val=str(tmp_path / "dst"), image_size=6, num_workers=0).val_dataloader()
    assert len(batch["key"]) == 3


def grey(*levels):
    return [(level,) * 3 for level in levels]


def shorts(*values, order=">"):
    return struct.pack(f"{order}{len(values)}H", *values)


DEEP = shorts(0, 257, 1000, 32768, 65535, order="<")
PALETTE = bytes([9, 9, 9, 0, 0, 0, 1, 2, 3, 4, 5, 6])
COLOURS = [(320, 3, 768, shorts(*(257 * i for i in range(256)), *[0] * 256, *[65535] * 256, order="<"))]
SIGNED, FLOAT = ([(339, 3, 1, shorts(kind, order="<"))] for kind in (2, 3))
RARE = {
    "16-bit grey, one transparent": (png(16, 0, shorts(0, 257, 1000, 65535), 4, shorts(1000)), grey(0, 1, 255, 255)),
    "16-bit grey, black transparent": (png(16, 0, shorts(0, 257, 65535), 3, shorts(0)), grey(255, 1, 255)),
    "8-bit grey, one transparent": (png(8, 0, bytes([0, 100, 5]), 3, shorts(100)), grey(0, 255, 5)),
    "4-bit grey, one transparent": (png(4, 0, bytes([0x05, 0xA1]), 4, shorts(5)), grey(0, 255, 170, 17)),
    "2-bit grey, one transparent": (png(2, 0, bytes([0b00011011]), 4, shorts(1)), grey(0, 255, 170, 255)),
    "1 bit, black transparent": (png(1, 0, bytes([0b01000000]), 2, shorts(0)), grey(255, 255)),
    "one colour transparent": (png(8, 2, bytes([1, 2, 3, 4, 5, 6]), 2, shorts(4, 5, 6)), [(1, 2, 3), (255,) * 3]),
    "palette with shares": (
        png(8, 3, bytes(range(4)), 4, bytes([0, 128]), PALETTE),
        [*grey(255, 127), (1, 2, 3), (4, 5, 6)],
    ),
    "grey with alpha": (png(8, 4, bytes([0, 255, 100, 0, 100, 128]), 3), grey(0, 255, 177)),
    "16-bit grey with alpha": (png(16, 4, shorts(0, 65535, 257, 0, 25700, 32896), 3), grey(0, 255, 177)),
    "16-bit colour": (png(16, 2, shorts(257, 65535, 32896), 1), [(1, 255, 128)]),
    "16-bit TIFF": (tiff(DEEP, 5, 1, photometric=1, bits=(16,)), grey(0, 1, 4, 128, 255)),
    "16-bit TIFF, 0 is white": (tiff(DEEP, 5, 1, photometric=0, bits=(16,)), grey(255, 254, 251, 127, 0)),
    "8-bit TIFF, 0 is white": (tiff(bytes([0, 1, 255]), 3, 1, photometric=0, bits=(8,)), grey(255, 254, 0)),
    "1-bit TIFF, 0 is white": (tiff(bytes([0b01000000]), 2, 1, photometric=0, bits=(1,)), grey(255, 0)),
    "12-bit TIFF": (tiff(b"\x00\x0f\xff\x80\x00\x10", 4, 1, photometric=1, bits=(12,)), grey(0, 255, 128, 1)),
    "premultiplied": (
        tiff(bytes([64, 0, 0, 128, 0, 0, 0, 0, 255, 0, 0, 255]), 3, 1, bits=(8,) * 4, extra=(1,)),
        [(191, 127, 127), (255, 255, 255), (255, 0, 0)],
    ),
    "premultiplied grey": (
        tiff(bytes([0, 255, 0, 0, 50, 128]), 3, 1, photometric=1, bits=(8, 8), extra=(1,)),
        grey(0, 255, 177),
    ),
    "palette and alpha": (
        tiff(bytes([5, 255, 5, 0, 6, 128]), 3, 1, COLOURS, photometric=3, bits=(8, 8), extra=(2,)),
        [(5, 0, 255), (255, 255, 255), (130, 127, 255)],
    ),
    "CMYK": (
        tiff(bytes([255, 0, 0, 0, 0, 0, 0, 255, 0, 0, 0, 0]), 3, 1, photometric=5, bits=(8,) * 4),
        [(0, 255, 255), (0, 0, 0), (255, 255, 255)],
    ),
    "Lab": (tiff(bytes([128, 0, 0]), 1, 1, photometric=8), grey(119)),
    "PGM of 1,000 levels": (b"P5 3 1 1000\n" + shorts(0, 500, 1000), grey(0, 128, 255)),
    "PGM of 100 levels": (b"P5 3 1 100\n" + bytes([0, 50, 100]), grey(0, 128, 255)),
}
REFUSED = {
    "signed 16 bits": (tiff(shorts(9, order="<"), 1, 1, SIGNED, photometric=1, bits=(16,)), "signed"),
    "signed 8 bits": (tiff(b"\xff", 1, 1, SIGNED, photometric=1, bits=(8,)), "signed"),
    "32 bits": (tiff(bytes([1, 0, 0, 0]), 1, 1, photometric=1, bits=(32,)), "32-bit"),
    "signed 32 bits": (tiff(bytes([1, 0, 0, 0]), 1, 1, SIGNED, photometric=1, bits=(32,)), "32-bit"),
    "float": (tiff(struct.pack("<f", 0.5), 1, 1, FLOAT, photometric=1, bits=(32,)), "floating-point"),
    "PFM": (b"Pf\n1 1\n-1.0\n" + struct.pack("<f", 0.5), "floating-point"),
    "one of 2**48 colours transparent": (png(16, 2, shorts(1, 2, 3), 1, shorts(1, 2, 3)), "transparent"),
    "two kinds of levels": (tiff(bytes(3), 1, 1, bits=(8, 8, 4)), "Pillow reads"),
}


@pytest.mark.parametrize("name", RARE)
def test_rare_pixels(name):
    if name == "premultiplied grey" and ("La", "La") not in TiffImagePlugin.OPEN_INFO.values():
        pytest.skip("this version of Pillow refuses it")
    data, expected = RARE[name]
    assert [tuple(pixel) for pixel in np.asarray(decode_image(data))[0].tolist()] == expected


@pytest.mark.parametrize("name", REFUSED)
def test_what_has_no_known_range_is_refused(name):
    data, reason = REFUSED[name]
    with pytest.raises(PictureError, match=reason):
        decode_image(data)


@pytest.mark.parametrize(
    "error",
    [
        struct.error,
        SyntaxError,
        AttributeError,
        TypeError,
        IndexError,
        EOFError,
        zlib.error,
        Image.DecompressionBombError,
    ],
)
def test_whatever_pillow_raises_is_a_broken_picture(error, monkeypatch):
    data = encoded("PNG")
    for method in ("Image.open", "ImageFile.ImageFile.load"):
        with monkeypatch.context() as patch:
            patch.setattr(f"PIL.{method}", lambda *_: (_ for _ in ()).throw(error("reason")))
            with pytest.raises(PictureError, match=f"not a complete picture .{error.__name__}"):
                decode_image(data)


@pytest.mark.filterwarnings("ignore")  # of damage, and of sizes
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "TGA", "JPEG2000", "ICO", "PCX"])
def test_damaged_files_raise_nothing_else(kind):
    whole = encoded(kind)
    rng = np.random.default_rng(0)
    for _ in range(60):
        data = bytearray(whole)
        for at in rng.integers(0, min(len(data), 80 if rng.random() < 0.7 else len(data)), 3):
            data[at] = rng.integers(256)
        try:
            assert decode_image(bytes(data[: rng.integers(len(data) // 2, 2 * len(data))])).mode == "RGB"
        except PictureError as error:
            assert str(error)


@pytest.mark.parametrize("broken", [encoded("JPEG")[:150], b"\xff\xd8\xff\xe0\0\x07JFIF\0", None])
def test_a_broken_picture_of_a_folder_is_named(tmp_path, broken):
    """As evaluations and `flextok fid` read it; None is a link that leads nowhere."""
    (tmp_path / "a.png").write_bytes(encoded("PNG", exif=exif(1, more=DAMAGED["ASCII XResolution"])))
    if broken is None:
        (tmp_path / "b.jpg").symlink_to(tmp_path / "nowhere.jpg")
    else:
        (tmp_path / "b.jpg").write_bytes(broken)
    loader, count = open_pictures(str(tmp_path), batch_size=1)
    batches = iter(loader)
    assert count == 2 and next(batches)["key"] == ["a.png"]
    with pytest.raises(ValueError, match=r"b\.jpg: .*; repair or remove it"):
        next(batches)
