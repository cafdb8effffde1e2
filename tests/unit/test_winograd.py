"""Convolutions by minimal filtering: the function of torch's, in float64 to rounding and in float32 as exactly."""

import pytest
import torch
import torch.nn.functional as F

from flextok_pl.layers import winograd
from flextok_pl.layers.winograd import SAME, UPSAMPLED, Workspace, add_convolution, serves


def drawn(batch: int, height: int, width: int, inputs: int, outputs: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, C, H, W) and weights (D, C, 3, 3), in float64."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch, inputs, height, width, generator=generator, dtype=torch.float64)
    weight = torch.randn(outputs, inputs, 3, 3, generator=generator, dtype=torch.float64)
    return images, weight / (9 * inputs) ** 0.5


def ours(images: torch.Tensor, weight: torch.Tensor, upsampled: bool, start: torch.Tensor) -> torch.Tensor:
    """(B, C, H, W) -> (B, D, H', W'), added to `start`."""
    padded = F.pad(images, (1, 1, 1, 1)).permute(0, 2, 3, 1).contiguous()
    outputs = start.permute(0, 2, 3, 1).clone(memory_format=torch.contiguous_format)
    add_convolution(padded, weight, outputs, Workspace(padded), UPSAMPLED if upsampled else SAME)
    return outputs.permute(0, 3, 1, 2)


def directly(images: torch.Tensor, weight: torch.Tensor, upsampled: bool) -> torch.Tensor:
    images = F.interpolate(images, scale_factor=2.0, mode="nearest") if upsampled else images
    return F.conv2d(images, weight, padding=1)


@pytest.mark.parametrize("numbers", [1, 36 * 7 * 20, 2**20])  # one row of tiles at a time; some rows; several images
@pytest.mark.parametrize("upsampled", [False, True])
@pytest.mark.parametrize("size", [(1, 4, 4, 1, 1), (3, 8, 20, 5, 7), (2, 28, 12, 7, 3), (5, 4, 8, 2, 6)])
def test_the_function_of_a_convolution(
    size: tuple[int, int, int, int, int], upsampled: bool, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(winograd, "NUMBERS_PER_CORE", numbers)
    images, weight = drawn(*size)
    expected = directly(images, weight, upsampled)
    start = torch.randn(expected.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    outputs = ours(images, weight, upsampled, start)
    torch.testing.assert_close(outputs, start + expected, atol=1e-12, rtol=0)


def test_weights_in_any_order_of_memory() -> None:
    images, weight = drawn(1, 8, 8, 4, 6)
    expected, start = directly(images, weight, False), torch.zeros(1, 6, 8, 8, dtype=torch.float64)
    last = weight.contiguous(memory_format=torch.channels_last)
    assert not last.is_contiguous()
    torch.testing.assert_close(ours(images, last, False, start), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("upsampled", [False, True])
def test_float32_errs_no_more_than_a_direct_convolution(upsampled: bool) -> None:
    """Measured: 1.6e-6 of the largest value, and 0.6e-6 after an upsampling; directly with channels last 1.9e-6."""
    images, weight = drawn(1, 32, 32, 256, 256)
    expected = directly(images, weight, upsampled)
    outputs = ours(images.float(), weight.float(), upsampled, torch.zeros(expected.shape))
    assert (outputs - expected).abs().max() < 4e-6 * expected.abs().max()


def test_what_is_served() -> None:
    wide = torch.empty(128, 256, 3, 3)
    assert serves(wide, 32, 60)
    assert not serves(wide, 32, 62)
    assert not serves(torch.empty(32, 512, 3, 3), 32, 32)
    assert not serves(torch.empty(128, 128, 1, 1), 32, 32)
    assert not serves(wide, 16, 16), "transforming the weights would take longer"


def test_memory_is_taken_again() -> None:
    workspace = Workspace(torch.empty(0, dtype=torch.float64))
    first = workspace.take("a", 4, 6)
    assert first.dtype == torch.float64
    assert workspace.take("a", 2, 3).data_ptr() == first.data_ptr()
    assert workspace.take("b", 2, 3).data_ptr() != first.data_ptr()
    assert workspace.take("a", 5, 6).shape == (5, 6)
