"""Draw the pictures of results: grids of images under headings, and figures.

B images, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flextok_pl.channels import visible
from flextok_pl.data.transforms import MODES
from flextok_pl.files import whole_file
from flextok_pl.metrics.images import to_uint8

PADDING = 2
"""White pixels between the images of a grid."""

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


def image_grid(columns: Iterable[tuple[str | int, Tensor]], names: Sequence[str] | None = None) -> Tensor:
    """Draw (B, 3, H, W) images, floating point in [-1, 1] or uint8, as columns under headings: (3, H', W') uint8.

    Grey images, (B, 1, H, W), are drawn too; of more than 3 channels the first three are drawn. A heading that is a
    number is a token budget. `names` label the B rows; long ones are broken into lines, and cut if they do not fit.
    """
    headed = [(f"k={heading}" if isinstance(heading, int) else heading, images) for heading, images in columns]
    batch, _, height, width = shape = headed[0][1].shape
    font = _fitting_font([heading for heading, _ in headed], width)
    top = int(font.getbbox("original")[3]) + 2 * PADDING
    first = PADDING if names is None else 2 * width + PADDING
    size = (first + len(headed) * (width + PADDING), batch * (height + PADDING) + top)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    points = max(8, min(16, height // 5))
    small = ImageFont.load_default(points)
    for row, name in enumerate(names or []):
        text = "\n".join(_lines(name, small, 2 * width - 2 * PADDING)[: max(1, int(height / (1.4 * points)))])
        middle = (PADDING, top + row * (height + PADDING) + height / 2)
        draw.multiline_text(middle, text, fill="black", font=small, anchor="lm")
    for column, (heading, images) in enumerate(headed):
        if images.shape != shape:
            raise ValueError(f"{heading}: shape {tuple(images.shape)} differs from the first one's, {tuple(shape)}")
        left = first + column * (width + PADDING)
        draw.text((left + width / 2, PADDING), heading, fill="black", font=font, anchor="ma")
        pixels = visible(images if images.dtype == torch.uint8 else to_uint8(images))
        for row, picture in enumerate(pixels.permute(0, 2, 3, 1).cpu().numpy()):  # (H, W, 3)
            canvas.paste(Image.fromarray(picture), (left, top + row * (height + PADDING)))
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def same_size(images: Sequence[Tensor]) -> Tensor:
    """Pad images (C, H, W) uint8 of any sizes with white to the largest: (B, C, H, W)."""
    height, width = (max(image.shape[axis] for image in images) for axis in (1, 2))
    framed = []
    for image in images:
        rows, columns = height - image.shape[1], width - image.shape[2]
        sides = (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)
        framed.append(torch.nn.functional.pad(image, sides, value=255))
    return torch.stack(framed)


def figure_to_image(figure: Figure) -> Tensor:
    """Render a matplotlib figure: (3, H, W) uint8."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()  # type: ignore[no-untyped-call]
    return torch.from_numpy(np.asarray(canvas.buffer_rgba())[..., :3].copy()).permute(2, 0, 1)  # type: ignore[no-untyped-call]


def save_figure(figure: Figure, path: Path) -> None:
    """Write a matplotlib figure as a PNG file."""
    with whole_file(path) as temporary:
        figure.savefig(temporary, format="png")


def save_png(image: Tensor, path: Path, synced: bool = False) -> None:
    """Write (C, H, W) uint8 as a PNG file: grey, RGB or RGBA, or three of any other channels; see `whole_file`."""
    pixels = image if len(image) in MODES else visible(image[None])[0]
    with whole_file(path, synced=synced) as temporary:
        Image.fromarray(pixels.permute(1, 2, 0).squeeze(2).cpu().numpy()).save(temporary, format="png")


def _fitting_font(texts: list[str], width: int) -> Font:
    """The largest legible font whose texts fit into `width` pixels."""
    for size in range(max(8, min(24, width // 5)), 8, -1):
        font = ImageFont.load_default(size)
        if max(font.getlength(text) for text in texts) <= width:
            return font
    return ImageFont.load_default(8)


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
