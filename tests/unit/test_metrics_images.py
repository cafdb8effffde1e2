"""Rounding and pixel errors."""

import math

import pytest
import torch

from flextok_pl.metrics.images import PSNR_CAP, image_errors, to_uint8


def test_every_grey_level_survives_the_way_to_float_and_back():
    levels = torch.arange(256, dtype=torch.uint8)
    assert torch.equal(to_uint8(levels.float() / 127.5 - 1), levels)
    assert torch.equal(to_uint8((levels.double() / 255) * 2 - 1), levels)


def test_rounding_and_clamping():
    values = torch.tensor([-7.0, -1.0, 99.4 / 127.5 - 1, 99.6 / 127.5 - 1, 1.0, 1.5])
    assert to_uint8(values).tolist() == [0, 0, 99, 100, 255, 255]


@pytest.mark.parametrize("bad", [torch.tensor([math.nan]), torch.tensor([math.inf]), torch.tensor([3])])
def test_what_is_no_image_is_refused(bad):
    with pytest.raises(ValueError, match=r"NaN|dtype"):
        to_uint8(bad)


def test_errors_by_hand():
    original = torch.zeros(2, 3, 16, 16, dtype=torch.uint8)
    changed = original.clone()
    changed[1] = 51  # a fifth of the range everywhere
    errors = image_errors(original, changed)
    assert errors["mae"].tolist() == pytest.approx([0.0, 0.2], abs=1e-12)
    assert errors["mse"].tolist() == pytest.approx([0.0, 0.04], abs=1e-12)
    assert errors["psnr"].tolist() == pytest.approx([PSNR_CAP, -10 * math.log10(0.04)])
    # Flat images have no variance, so SSIM is its luminance term (c1) / (0.2**2 + c1) with c1 = 0.01**2.
    assert errors["ssim"].tolist() == pytest.approx([1.0, 1e-4 / (0.04 + 1e-4)], rel=1e-3)


def test_errors_of_a_sample_do_not_depend_on_its_batch():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randint(0, 256, (5, 3, 24, 24), generator=generator, dtype=torch.uint8) for _ in range(2))
    together = image_errors(a, b)
    for name, values in together.items():
        alone = torch.cat([image_errors(a[i : i + 1], b[i : i + 1])[name] for i in range(5)])
        torch.testing.assert_close(alone, values, rtol=1e-6, atol=0)


def test_errors_do_not_follow_autocast():
    images = torch.randint(256, (2, 2, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    expected = image_errors(*images)
    with torch.autocast("cpu", torch.bfloat16):
        found = image_errors(*images)
    assert all(torch.equal(found[name], values) for name, values in expected.items())


def test_a_reconstruction_of_another_size_is_refused():
    with pytest.raises(ValueError, match=r"\(1, 3, 8, 8\).*\(1, 3, 16, 16\)"):
        image_errors(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), torch.zeros(1, 3, 8, 8, dtype=torch.uint8))
