"""Pixel metrics per image, and the picture that shows them: originals beside reconstructions.

All pixel metrics compare images after rounding to 8 bits, as a viewer sees them, on the scale [0, 1] (level / 255).
B images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flextok_pl.precision import full_precision

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

PSNR_CAP = 100.0
"""PSNR in dB reported for equal images, whose error is zero."""


def to_uint8(images: Tensor) -> Tensor:
    """Bring images to 8 bits by rounding to the nearest grey level; the only place in the suite that does it.

    Args:
        images: (..., H, W) floating point in [-1, 1]; what lies outside is clamped.

    Returns:
        Of the same shape, uint8.

    Raises:
        ValueError: the images are not floating point, or hold NaN or infinity.
    """
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; give floating point in [-1, 1]")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite values; the model that made them has diverged")
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def image_errors(originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """Errors of each image on the [0, 1] scale.

    Args:
        originals: (B, 3, H, W) uint8.
        reconstructions: (B, 3, H, W) uint8.

    Returns:
        `mae`, `mse`, `psnr` (dB, peak 1, at most `PSNR_CAP`) and `ssim` (11 x 11 Gaussian window of sigma 1.5), each
        (B,) float64 on the CPU.

    Raises:
        ValueError: shapes or types differ.
    """
    if originals.dtype != torch.uint8 or reconstructions.dtype != torch.uint8:
        raise ValueError(f"images have dtype {originals.dtype} and {reconstructions.dtype}; bring both to uint8")
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"reconstructions have shape {tuple(reconstructions.shape)}, originals {tuple(originals.shape)}: the model "
            "decodes to another size than it was given; evaluate at its training size"
        )
    # Integer sums are exact, so the result is the same on every device and in every batch.
    difference = originals.int() - reconstructions.int()
    mae = difference.abs().flatten(1).sum(1).cpu().double() / (255 * difference[0].numel())
    mse = difference.square().flatten(1).sum(1).cpu().double() / (255**2 * difference[0].numel())
    with full_precision(originals.device):
        ssim = structural_similarity_index_measure(
            reconstructions.float() / 255, originals.float() / 255, data_range=1.0, reduction="none"
        )
    assert isinstance(ssim, Tensor)
    return {
        "mae": mae,
        "mse": mse,
        "psnr": -10 * mse.clamp_min(10 ** (-PSNR_CAP / 10)).log10(),
        "ssim": ssim.reshape(-1).cpu().double(),
    }


def reconstruction_grid(originals: Tensor, reconstructions: Mapping[int, Tensor], padding: int = 2) -> Tensor:
    """One row per image: the original, then its reconstruction at each budget, under column headings.

    Args:
        originals: (B, 3, H, W), floating point in [-1, 1] or uint8.
        reconstructions: token budget -> (B, 3, H, W), in the order of the columns.
        padding: white pixels between pictures.

    Returns:
        (3, H', W') uint8.

    Raises:
        ValueError: shapes differ.
    """
    columns = [("original", originals), *((f"k={budget}", images) for budget, images in reconstructions.items())]
    for heading, images in columns:
        if images.shape != originals.shape:
            raise ValueError(f"{heading}: shape {tuple(images.shape)} differs from originals {tuple(originals.shape)}")
    return _grid(columns, None, padding)


def generation_grid(names: Sequence[str], generated: Mapping[int, Tensor], padding: int = 2) -> Tensor:
    """One row per condition: its name, then the image at each budget, under column headings.

    Args:
        names: B conditions; long ones are broken into lines, and cut where they do not fit.
        generated: token budget -> (B, 3, H, W), floating point in [-1, 1] or uint8.
        padding: white pixels between pictures.

    Returns:
        (3, H', W') uint8.
    """
    return _grid([(f"k={budget}", images) for budget, images in generated.items()], names, padding)


def pairs_grid(names: Sequence[str], pairs: Mapping[str, tuple[Tensor, Tensor]], padding: int = 2) -> Tensor:
    """One row per name: under each heading an original and its reconstruction.

    Args:
        names: B names.
        pairs: heading of the reconstructions -> originals and reconstructions, each (B, 3, H, W) uint8.
        padding: white pixels between pictures.

    Returns:
        (3, H', W') uint8.
    """
    columns = [
        (heading, images)
        for name, pair in pairs.items()
        for heading, images in zip(("original", name), pair, strict=True)
    ]
    return _grid(columns, names, padding)


def _grid(columns: Sequence[tuple[str, Tensor]], names: Sequence[str] | None, padding: int) -> Tensor:
    """Columns of (B, 3, H, W) pictures under their headings, with or without a column of names before them."""
    batch, _, height, width = columns[0][1].shape
    font = _fitting_font([heading for heading, _ in columns], width)
    top = int(font.getbbox("original")[3]) + 2 * padding
    first = padding if names is None else 2 * width + padding
    size = (first + len(columns) * (width + padding), batch * (height + padding) + top)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    points = max(8, min(16, height // 5))
    small = ImageFont.load_default(points)
    for row, name in enumerate(names or []):
        text = "\n".join(_lines(name, small, 2 * width - 2 * padding)[: max(1, int(height / (1.4 * points)))])
        middle = (padding, top + row * (height + padding) + height / 2)
        draw.multiline_text(middle, text, fill="black", font=small, anchor="lm")
    for column, (heading, images) in enumerate(columns):
        left = first + column * (width + padding)
        draw.text((left + width / 2, padding), heading, fill="black", font=font, anchor="ma")
        pixels = images if images.dtype == torch.uint8 else to_uint8(images)
        for row, picture in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):  # (H, W, 3)
            canvas.paste(Image.fromarray(picture), (left, top + row * (height + padding)))
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def _lines(text: str, font: Font, width: int) -> list[str]:
    """Break a text into lines of at most `width` pixels, at its spaces."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if lines[-1] and font.getlength(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def figure_to_image(figure: Figure) -> Tensor:
    """Draw a matplotlib figure: (3, H, W) uint8, at 100 pixels per inch."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)  # type: ignore[no-untyped-call]


def save_png(image: Tensor, path: Path) -> None:
    """Write (3, H, W) uint8 as a PNG file."""
    Image.fromarray(image.permute(1, 2, 0).cpu().numpy()).save(path)


def _fitting_font(texts: list[str], width: int) -> Font:
    """The largest legible font whose texts fit into `width` pixels."""
    for size in range(max(8, min(24, width // 5)), 8, -1):
        font = ImageFont.load_default(size)
        if max(font.getlength(text) for text in texts) <= width:
            return font
    return ImageFont.load_default(8)
