"""Draw the picture of a search: the kept candidates of each step, their scores and their parents.

W kept candidates of a step, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from flextok_pl.channels import visible
from flextok_pl.evaluation.report import format_value

MOST_COLUMNS = 12
"""Most candidates of a step that are drawn, best first."""

GAP, EDGE = 12, 3
"""Pixels between tiles, and of the frame around the ancestors of the result."""

LINE, CHOSEN = (170, 170, 170), (200, 30, 30)
"""Colours of lines, and of the lines to the result."""


class TreeRow(NamedTuple):
    """The kept candidates of one step, best first."""

    num_tokens: int
    images: Tensor  # (W, C, H, W) uint8
    scores: Sequence[float]  # W
    parents: Sequence[int]  # W positions in the row above; not used in the first row


def search_tree(rows: Sequence[TreeRow]) -> Tensor:
    """Draw one row per step and one tile per kept candidate, with its score, and a line from its parent.

    The ancestors of the best candidate of the last row are framed. Returns (3, H', W') uint8.
    """
    height, width = rows[0].images.shape[2:]
    font = ImageFont.load_default(max(9, min(16, width // 6)))
    line_height = int(font.getbbox("0123456789k=")[3]) + 2
    labels = [f"k={row.num_tokens}" for row in rows]
    left = int(max(font.getlength(label) for label in labels)) + 2 * GAP
    across, down = width + GAP, height + line_height + 3 * GAP
    columns = min(MOST_COLUMNS, max(len(row.images) for row in rows))
    canvas = Image.new("RGB", (left + columns * across, len(rows) * down - GAP), "white")
    draw = ImageDraw.Draw(canvas)
    path = _path(rows)

    def place(row: int, column: int) -> tuple[int, int]:
        return left + column * across, GAP + row * down

    for i, row in enumerate(rows):
        shown = min(columns, len(row.images))
        # The chosen line is drawn last, over the others.
        for column in sorted(range(shown), key=lambda each: each == path[i]) if i else ():
            if row.parents[column] < columns:
                (x, y), (above_x, above_y) = place(i, column), place(i - 1, row.parents[column])
                start = (above_x + width // 2, above_y + height + EDGE + line_height + 2)
                colour = CHOSEN if column == path[i] else LINE
                draw.line([start, (x + width // 2, y)], colour, 2)
        draw.text((GAP, place(i, 0)[1] + height // 2), labels[i], "black", font, anchor="lm")
        for column, picture in enumerate(visible(row.images[:shown]).permute(0, 2, 3, 1).cpu().numpy()):  # (H, W, 3)
            x, y = place(i, column)
            if column == path[i]:
                draw.rectangle((x - EDGE, y - EDGE, x + width + EDGE - 1, y + height + EDGE - 1), CHOSEN)
            canvas.paste(Image.fromarray(picture), (x, y))
            score = format_value(row.scores[column])
            draw.text((x + width / 2, y + height + EDGE), score, "black", font, anchor="ma")
    return torch.from_numpy(np.asarray(canvas).copy()).permute(2, 0, 1)


def _path(rows: Sequence[TreeRow]) -> list[int]:
    """Position in each row of the ancestors of the first candidate of the last row."""
    path = [0]
    for row in rows[:0:-1]:
        path.append(row.parents[path[-1]])
    return path[::-1]
