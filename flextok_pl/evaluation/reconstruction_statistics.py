"""Reconstruction quality at several token budgets, accumulated batch by batch and added up over processes.

B images, N of all batches and processes, H x W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.backbones.pretrained import MeasuringNetwork
from flextok_pl.distributed import all_reduce_sum, gather_objects
from flextok_pl.evaluation.statistics import BudgetStatistics, BudgetT, add_features
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.images import image_errors
from flextok_pl.metrics.kernel import KernelReference
from flextok_pl.precision import as_float64


class PairDistance(Protocol):
    """How far each image is from another: a function, or a network, which records then name."""

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 twice -> (B,) float64."""


class ImageMoments:
    """Variance of a set of images of one size around their mean image, in float64, on the [0, 1] scale.

    Sums are kept on a device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # Images, and the sum of the squares of their pixels.
        self._totals = torch.zeros(2, dtype=torch.float64, device=device)
        self._sum = torch.zeros((), dtype=torch.float64, device=device)

    def update(self, images: Tensor) -> None:
        """Add (B, 3, H, W) uint8."""
        squares = as_float64(images.to(torch.int64).square().sum()).to(self._device) / 255**2
        self._totals = self._totals + torch.stack([torch.full_like(squares, len(images)), squares])
        self._sum = self._sum + as_float64(images.sum(0, dtype=torch.int64)).to(self._device) / 255

    def all_reduce(self) -> None:
        """Replace these moments by those of the images of all processes."""
        shape = max((tuple(each) for each in gather_objects(list(self._sum.shape))), key=len)  # one may have no images
        self._sum = all_reduce_sum(self._sum.expand(shape).contiguous())
        self._totals = all_reduce_sum(self._totals)

    def state_dict(self) -> dict[str, Any]:
        """Tensors that `load_state_dict` takes."""
        return {"totals": self._totals, "sum": self._sum}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what other moments had summed up."""
        self._totals, self._sum = state["totals"].to(self._device), state["sum"].to(self._device)

    @property
    def variance(self) -> float:
        """Mean over pixels and channels of the variance over images (divisor N)."""
        count, squares = self._totals
        mean = self._sum / count
        return float(squares / (count * mean.numel()) - mean.square().mean())


class ReconstructionStatistics(BudgetStatistics[BudgetT]):
    """Everything that per-budget reconstruction metrics need; see `BudgetStatistics`.

    `perceptual` names the distances whose mean over images is taken.
    """

    def __init__(
        self,
        budgets: Sequence[BudgetT],
        extractor: FeatureExtractor,
        pool_fraction: float = 1.0,
        perceptual: Mapping[str, PairDistance] | None = None,
        real: FeatureSet | None = None,
    ) -> None:
        self._perceptual = dict(perceptual or {})
        names = ("mae", "mse", "psnr", "ssim", *self._perceptual, "seed_variance")
        super().__init__(budgets, extractor, pool_fraction, None, real, names)
        self._originals = self._further["originals"] = ImageMoments(self.home)

    @property
    def how(self) -> dict[str, dict[str, Any]]:
        """See `BudgetStatistics`."""
        ((name, facts),) = super().how.items()
        return {name: {"kernel": f"{facts['kernel']}, originals and reconstructions paired"}} | {
            metric: {f"{metric}_network": distance.name, f"{metric}_weights_hash": distance.weights_hash}
            for metric, distance in self._perceptual.items()
            if isinstance(distance, MeasuringNetwork)
        }

    def update_real(self, images: Tensor, keys: Sequence[str]) -> None:
        """See `BudgetStatistics`."""
        super().update_real(images, keys)
        self._originals.update(images)

    def update_reconstructions(
        self,
        budget: BudgetT,
        originals: Tensor,
        reconstructions: Tensor,
        keys: Sequence[str],
        from_other_noise: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Add reconstructions at one budget, (B, 3, H, W) uint8 like their originals; returns (B,) errors by name.

        Those from other noise serve the variance of pixels over noise.
        """
        errors = image_errors(originals, reconstructions)
        for name, distance in self._perceptual.items():
            errors[name] = distance(originals, reconstructions)
        if from_other_noise:
            levels = as_float64(torch.stack([reconstructions, *from_other_noise])) / 255
            errors["seed_variance"] = levels.var(0).flatten(1).mean(1)
        for name, values in errors.items():
            self._add_values(budget, name, values)
        add_features(self.made[budget], self._extractor(reconstructions), keys, self._pool_fraction)
        return errors

    def _values_at(self, budget: BudgetT, real: KernelReference, kernel_seed: int) -> dict[str, float]:
        """Distances first (absent below two images), then pixel metrics as means over images."""
        result = self._distances(budget, real, kernel_seed, paired=True) | self._means(budget)
        variance = self._originals.variance
        if variance > 0:
            result["mse_over_variance"] = result["mse"] / variance
        return result
