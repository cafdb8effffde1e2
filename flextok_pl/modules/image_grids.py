"""Image sizes of a training as grids of patches of its tokenizer.

A grid is (rows, columns).
"""

from __future__ import annotations

import dataclasses
from typing import Any

from flextok_pl.config import FlexTokConfig
from flextok_pl.contracts import checked_size, height_width

Grid = tuple[int, int]


def grids_of(config: FlexTokConfig, data: Any) -> tuple[Grid, ...]:
    """The grids of a data module's training images, `shapes` or all of one `image_size`; empty if it states no size.

    Raises:
        ValueError: patches do not divide a size, or the position tables are too small for it.
    """
    shapes, size = getattr(data, "shapes", None) or (), getattr(data, "image_size", None)
    grids = tuple(config.grid_of(height_width(checked_size(shape)), "data.shapes") for shape in shapes)
    if size is None or (grids and data.eval_shapes):
        return grids
    of_evaluation = config.grid_of(height_width(checked_size(size)), "data.image_size")
    return grids or (of_evaluation,)


def trained_on(config: FlexTokConfig, grids: tuple[Grid, ...]) -> FlexTokConfig:
    """The configuration with a note of the grids, unless it states them already."""
    return dataclasses.replace(config, trained_grids=() if grids == (config.grid_size,) else grids)
