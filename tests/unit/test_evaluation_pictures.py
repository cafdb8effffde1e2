"""The grid picture, and pictures as files."""

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from flextok_pl.evaluation.pictures import figure_to_image, image_grid, save_figure, save_png
from flextok_pl.metrics.images import to_uint8


def test_grid_has_originals_first_and_one_column_per_budget():
    originals = torch.full((2, 3, 40, 48), 10, dtype=torch.uint8)
    grid = image_grid([("original", originals), (1, originals + 20), (16, originals + 40)])
    assert grid.dtype == torch.uint8
    top = grid.shape[1] - 2 * 42
    assert grid.shape == (3, top + 84, 3 * 50 + 2)
    for column, level in enumerate((10, 30, 50)):
        left = 2 + column * 50
        for start in (top, top + 42):
            assert (grid[:, start : start + 40, left : left + 48] == level).all()
        assert (grid[:, :top, left : left + 48] < 128).any(), "the column has a heading"


def test_grid_takes_model_output_and_refuses_mixed_shapes():
    images = torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)
    as_float, as_levels = (image_grid([("original", x), (4, x)]) for x in (images, to_uint8(images)))
    assert torch.equal(as_float, as_levels)
    with pytest.raises(ValueError, match="k=4"):
        image_grid([("original", images), (4, images[:, :, :16])])


def test_files_hold_what_is_drawn(tmp_path):
    figure = Figure(figsize=(2, 1), dpi=120)
    figure.add_subplot().plot([0, 1])
    drawn = figure_to_image(figure)
    assert drawn.shape == (3, 120, 240)
    save_png(drawn, tmp_path / "image.png")
    save_figure(figure, tmp_path / "figure.png")
    for name in ("image", "figure"):
        pixels = np.asarray(Image.open(tmp_path / f"{name}.png").convert("RGB"))
        assert np.array_equal(pixels, drawn.permute(1, 2, 0).numpy()), name
    assert sorted(file.name for file in tmp_path.iterdir()) == ["figure.png", "image.png"]
    for channels, mode in ((1, "L"), (2, "RGB"), (4, "RGBA"), (5, "RGB")):
        save_png(drawn[:1].expand(channels, -1, -1), tmp_path / "image.png")
        written = Image.open(tmp_path / "image.png")
        assert written.mode == mode and np.array_equal(np.asarray(written.getchannel(0)), drawn[0])
