"""Measure errors of pixels after rounding to 8 bits, as a viewer sees images, on the scale [0, 1] (level / 255).

B images, H x W pixels.
"""

import torch
from torch import Tensor
from torchmetrics.functional.image import structural_similarity_index_measure

from flextok_pl.parts import in_parts
from flextok_pl.precision import as_float64, full_precision

PSNR_CAP = 100.0  # dB, for equal images, whose error is zero


def to_uint8(images: Tensor) -> Tensor:
    """Clamp images to [-1, 1] and round them to 8 bits; all code uses this function."""
    if not images.is_floating_point():
        raise ValueError(f"images have dtype {images.dtype}; give floating point in [-1, 1]")
    if not images.isfinite().all():
        raise ValueError("images hold NaN or infinite values; the model that made them has diverged")
    return images.float().add(1).mul(127.5).round().clamp(0, 255).to(torch.uint8)


def image_errors(originals: Tensor, reconstructions: Tensor) -> dict[str, Tensor]:
    """Errors of each image on the [0, 1] scale: two (B, 3, H, W) uint8 -> values of (B,) float64.

    They are `mae`, `mse`, `psnr` (dB, peak 1, at most `PSNR_CAP`) and `ssim` (11 x 11 Gaussian window of sigma 1.5), on
    the images' `summing_device`, without waiting for it.
    """
    if originals.dtype != torch.uint8 or reconstructions.dtype != torch.uint8:
        raise ValueError(f"images have dtype {originals.dtype} and {reconstructions.dtype}; bring both to uint8")
    if originals.shape != reconstructions.shape:
        raise ValueError(
            f"reconstructions have shape {tuple(reconstructions.shape)}, originals {tuple(originals.shape)}: the model "
            "decodes to another size; evaluate at its training size"
        )
    # Integer sums are exact, so the result is the same on every device and in every batch.
    difference = originals.int() - reconstructions.int()
    mae = as_float64(difference.abs().flatten(1).sum(1)) / (255 * difference[0].numel())
    mse = as_float64(difference.square().flatten(1).sum(1)) / (255**2 * difference[0].numel())
    with full_precision(originals.device):
        ssim = in_parts(_similarities, originals, reconstructions)
    return {
        "mae": mae,
        "mse": mse,
        "psnr": -10 * mse.clamp_min(10 ** (-PSNR_CAP / 10)).log10(),
        "ssim": as_float64(ssim),
    }


def _similarities(originals: Tensor, reconstructions: Tensor) -> Tensor:
    """The `ssim` of `image_errors`, in float32."""
    levels = (reconstructions.float() / 255, originals.float() / 255)
    similarities = structural_similarity_index_measure(*levels, data_range=1.0, reduction="none")
    assert isinstance(similarities, Tensor)
    return similarities.reshape(-1)
