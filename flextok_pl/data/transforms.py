"""Turn encoded pictures into tensors: conversion to RGB, the evaluation crop and the training augmentations.

Shapes in this file: H x W target size, C channels.
"""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import default_collate

from flextok_pl.contracts import ImageSize, height_width
from flextok_pl.data.metadata import orientation_of, strip_metadata, turned
from flextok_pl.keys import text_generator

with suppress(ImportError):  # optional package with which Pillow reads .heic
    import pillow_heif

    pillow_heif.register_heif_opener()


@dataclass(frozen=True)
class Augmentation:
    """Random changes of a training picture; a window of the source is resized once, antialiased.

    The window has the aspect ratio of the target size. Photos need `crop_scale` and `hflip`. Drawings on a plain ground
    also allow `translate` and `scale`, which let the window leave the picture; it sees `fill` there.

    Args:
        crop_scale: bounds of the window's area as a share of the largest window's; its place in the picture is uniform.
        hflip: mirror half of the pictures.
        translate: largest shift of the window along each axis, as a share of its side.
        scale: bounds of an extra magnification; below 1 the picture shrinks within a frame of `fill`.
        fill: grey level outside the picture, 0..255.
    """

    crop_scale: tuple[float, float] = (0.8, 1.0)
    hflip: bool = True
    translate: float = 0.0
    scale: tuple[float, float] = (1.0, 1.0)
    fill: int = 255

    def __post_init__(self) -> None:
        for name in ("crop_scale", "scale"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not 0 < self.crop_scale[0] <= self.crop_scale[1] <= 1:
            raise ValueError(f"crop_scale={self.crop_scale} must be two ascending shares in (0, 1]")
        if not 0 < self.scale[0] <= self.scale[1]:
            raise ValueError(f"scale={self.scale} must be two ascending positive factors")
        if not 0 <= self.translate < 1:
            raise ValueError(f"translate={self.translate} must be a share of the window in [0, 1)")
        if not 0 <= self.fill <= 255:
            raise ValueError(f"fill={self.fill} must be a grey level in 0..255")

    @property
    def smallest_window(self) -> float:
        """Side of the smallest window as a share of the largest one's."""
        return math.sqrt(self.crop_scale[0]) / self.scale[1]


DEFAULT_AUGMENTATION = Augmentation()


def sample_generator(seed: int, epoch: int, key: str) -> torch.Generator:
    """Make a generator that depends on (seed, epoch, key) only, not on order, rank or worker."""
    return text_generator(f"{seed}/{epoch}/{key}")


class PictureError(ValueError):
    """A picture that is broken, or of a kind whose range of levels is unknown."""


MODES = {1: "L", 3: "RGB", 4: "RGBA"}
"""Pillow's modes by number of channels: grey, colour, colour with opacity."""


def check_channels(channels: int) -> None:
    """Refuse a number of channels that picture files do not have."""
    if channels not in MODES:
        raise ValueError(
            f"channels={channels} must be 1 (grey), 3 (colour) or 4 (colour with opacity), as in picture files; write "
            "pictures of other channels as latents (write_latents)"
        )


def decode_image(data: bytes, least: tuple[int, int] | None = None, channels: int = 3) -> Image.Image:
    """Decode a picture of any common kind to 8-bit RGB, grey or RGBA, by the number of channels.

    Grey, palette, CMYK, Lab and 1-bit pictures are converted; deeper ones are scaled to 8 bits; transparent ones are
    laid on white, except as RGBA. The orientation in the metadata is applied. No other metadata are read, so they may
    be damaged. A JPEG is decoded to 1/2, 1/4 or 1/8 of its size, by leaving out high frequencies, if that still covers
    `least`, a width and a height in pixels.

    Raises:
        PictureError: the bytes are not a complete picture, or its levels are floating-point, signed or of 32 bits.
    """
    with _decoding():
        image, orientation = _open(data)
        if least is not None:
            image.draft(None, least[::-1] if orientation >= 5 else least)  # has no effect on other kinds
        image.load()
        if channels == 4 and image.has_transparency_data:
            return turned(_to_rgba(image), orientation)
        return turned(_to_rgb(image).convert(MODES[channels]), orientation)


def inspect_image(data: bytes) -> tuple[str, tuple[int, int]]:
    """Read a picture's format, in lower case, and its width and height after orientation, from its header."""
    with _decoding():
        image, orientation = _open(data)
        name = "jpeg" if image.format == "MPO" else str(image.format).lower()  # a JPEG followed by others
        return name, image.size[::-1] if orientation >= 5 else image.size


@contextmanager
def _decoding() -> Iterator[None]:
    """Turn all errors of a broken picture into one.

    Pillow's readers raise OSError, SyntaxError, struct.error, IndexError, zlib.error and others, which are not part of
    its interface.
    """
    try:
        yield
    except PictureError:
        raise
    except UnidentifiedImageError as error:
        raise PictureError("not a complete picture of a kind that Pillow reads") from error
    except Exception as error:
        raise PictureError(f"not a complete picture ({type(error).__name__}: {error})") from error


def _open(data: bytes) -> tuple[Image.Image, int]:
    """Open a picture without decoding it; returns also its orientation."""
    content, exif, xmp = strip_metadata(data)
    image = Image.open(io.BytesIO(content))
    exif, xmp = (own or image.info.get(name) or b"" for own, name in ((exif, "exif"), (xmp, "xmp")))
    if image.format == "PNG" and "transparency" in image.info:
        # Pillow converts grey levels of 2 and 4 bits, and colours of 16, to 8 bits, but not their transparent colour.
        depth, kind = data[24:26]
        if kind == 2 and depth == 16:
            raise PictureError("one of its colours of 16 bits is transparent; save it as RGBA")
        if kind == 0 and depth < 8:
            image.info["transparency"] *= 255 // (2**depth - 1)
    return image, orientation_of(exif, xmp)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    tags = getattr(image, "tag_v2", {})  # those of a TIFF
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")) or tags.get(_SIGNED) == (2,):
        kind = {"F": "floating-point", "I": "signed or 32-bit"}.get(image.mode, "signed")
        raise PictureError(f"{kind} levels have no fixed range; convert the picture to 8 or 16 bits first")
    if image.mode.startswith("I"):
        return _deep_grey_to_rgb(image, tags)
    if image.has_transparency_data:
        rgba = _to_rgba(image)
        ground = Image.new("RGBA", rgba.size, (255, 255, 255, 255))
        return Image.alpha_composite(ground, rgba).convert("RGB")
    return image.convert("RGB")


def _to_rgba(image: Image.Image) -> Image.Image:
    return image.convert("LA").convert("RGBA") if image.mode == "La" else image.convert("RGBA")


_BITS, _PHOTOMETRIC, _SIGNED = 258, 262, 339
"""TIFF tags: bits of a level, whether 0 is white (value 0), and whether levels are signed (value 2)."""


def _deep_grey_to_rgb(image: Image.Image, tags: Mapping[int, Any]) -> Image.Image:
    """Convert a picture of up to 16 bits; formats other than TIFF give 16."""
    levels = np.asarray(image).astype(np.float64)  # (H, W)
    top = 2 ** tags.get(_BITS, (16,))[0] - 1
    grey = np.round(levels * (255 / top)).astype(np.uint8)
    if tags.get(_PHOTOMETRIC) == 0:
        grey = 255 - grey
    grey[levels == image.info.get("transparency", -1)] = 255
    return Image.fromarray(grey).convert("RGB")


def crop_name(size: ImageSize) -> str:
    """Name of `center_crop` for a size, in protocols."""
    if isinstance(size, int):
        return "centre square, antialiased bicubic"
    return f"largest centre window of height to width {size[0]}:{size[1]}, antialiased bicubic"


def covering(held: tuple[int, int], size: ImageSize) -> tuple[int, int]:
    """Width and height of a picture that is shrunk in its aspect ratio, as far as it still covers a size."""
    sides = zip(held, height_width(size)[::-1], strict=True)
    side, target = max(sides, key=lambda pair: pair[1] / pair[0])  # the axis that limits the shrinking
    if side <= target:
        return held
    return round(held[0] * target / side), round(held[1] * target / side)


def enlarges(held: ImageSize, size: ImageSize) -> bool:
    """Check that pictures of one size have fewer pixels than their crop to another size."""
    return any(side < target for side, target in zip(height_width(held), height_width(size), strict=True))


def center_crop(image: Image.Image, size: ImageSize) -> Image.Image:
    """Make the evaluation picture: resize to cover `size` by antialiased bicubic, and keep the centre.

    For squares this is the centre crop of guided diffusion (https://arxiv.org/abs/2105.05233) in one resampling step.
    Their halving by box filters before the bicubic step is a speed-up that Pillow's antialiased filter does not need.
    """
    height, width = height_width(size)
    across, down = _largest_window(image, height, width)
    left, top = (image.width - across) // 2, (image.height - down) // 2
    return image.resize((width, height), Image.Resampling.BICUBIC, box=(left, top, left + across, top + down))


def _largest_window(image: Image.Image, height: int, width: int) -> tuple[float, float]:
    """Width and height of the largest window of a picture with the aspect ratio of a size."""
    if image.width * height <= image.height * width:
        return image.width, image.width * height / width
    return image.height * width / height, image.height


def augment(image: Image.Image, size: ImageSize, augmentation: Augmentation, generator: torch.Generator) -> Image.Image:
    """Make a training picture of H x W; always seven draws, so that options do not affect each other's draws."""
    height, width = height_width(size)
    area, zoom, x, y, flip, *shift = torch.rand(7, generator=generator, dtype=torch.float64).tolist()
    low, high = augmentation.crop_scale
    share = (low + (high - low) * area) ** 0.5
    low, high = augmentation.scale
    zoomed = low + (high - low) * zoom
    starts, windows = [], []
    for side, largest, place, move in zip(
        image.size, _largest_window(image, height, width), (x, y), shift, strict=True
    ):
        kept = largest * share
        window = kept / zoomed
        starts.append(place * (side - kept) + ((kept - window) / 2 + (2 * move - 1) * augmentation.translate * window))
        windows.append(window)
    left, top = starts
    across, down = windows
    margin = int(np.ceil(max(0.0, -left, -top, left + across - image.width, top + down - image.height)))
    if margin:
        opaque = (255,) if image.mode == "RGBA" else ()
        image = ImageOps.expand(image, margin, (augmentation.fill,) * (len(image.getbands()) - len(opaque)) + opaque)
        left, top = left + margin, top + margin
    box = (left, top, min(left + across, image.width), min(top + down, image.height))
    image = image.resize((width, height), Image.Resampling.BICUBIC, box=box)
    if augmentation.hflip and flip < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """B pictures of H x W -> (B, C, H, W) float32 in [-1, 1]."""
    # In a loader's worker this stacks the pictures in shared memory, which saves a copy of the batch.
    return default_collate([picture_tensor(image) for image in images])  # type: ignore[no-any-return]


def picture_tensor(image: Image.Image) -> Tensor:
    """A picture of H x W -> (C, H, W) float32 in [-1, 1]."""
    pixels = torch.from_numpy(np.atleast_3d(np.array(image))).permute(2, 0, 1).contiguous()
    return pixels.to(torch.float32).div_(127.5).sub_(1.0)
