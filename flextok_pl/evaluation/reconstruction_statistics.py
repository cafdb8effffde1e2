"""Reconstruction quality at several token budgets, accumulated over batches and summed over processes.

B images, N of all batches and processes, H x W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

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
    """Distance between paired images: a function, or a network, which records then name."""

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Two (B, 3, H, W) uint8 -> (B,) float64."""


class ImageMoments:
    """Variance of a set of images around the mean image of their size, in float64, on the [0, 1] scale.

    Sums are kept on a device.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        # (C, H, W) -> (number of images, sum of their squared pixels), and the sum of the images.
        self._sums: dict[tuple[int, ...], tuple[Tensor, Tensor]] = {}

    def _of(self, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        zeros = torch.zeros(2, dtype=torch.float64, device=self._device)
        return self._sums.get(shape) or (zeros, zeros.new_zeros(shape))

    def update(self, images: Tensor) -> None:
        """Add (B, C, H, W) uint8."""
        totals, total = self._of(shape := tuple(images.shape[1:]))
        squares = as_float64(images.to(torch.int64).square().sum()).to(self._device) / 255**2
        totals = totals + torch.stack([torch.full_like(squares, len(images)), squares])
        self._sums[shape] = totals, total + as_float64(images.sum(0, dtype=torch.int64)).to(self._device) / 255

    def all_reduce(self) -> None:
        """Merge the moments of all processes."""
        shapes = sorted({shape for part in gather_objects(list(self._sums)) for shape in part})
        for shape in shapes:
            totals, total = self._of(shape)
            self._sums[shape] = all_reduce_sum(totals), all_reduce_sum(total)

    def state_dict(self) -> dict[str, Any]:
        """Tensors that `load_state_dict` takes."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore saved moments."""
        sums = state["sums"].items()
        self._sums = {shape: (a.to(self._device), b.to(self._device)) for shape, (a, b) in sums}

    @property
    def variance(self) -> float:
        """Mean over images of the mean squared distance of their pixels from the mean image's (divisor N)."""
        number, variance = sum(float(totals[0]) for totals, _ in self._sums.values()), 0.0
        for (count, squares), total in self._sums.values():
            mean = total / count
            variance += float(count) / number * float(squares / (count * mean.numel()) - mean.square().mean())
        return variance


class ReconstructionStatistics(BudgetStatistics[BudgetT]):
    """Statistics for all per-budget reconstruction metrics; see `BudgetStatistics`.

    `perceptual` names the distances whose mean over images is computed.
    """

    several_sizes: ClassVar[bool] = True

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

        Reconstructions from further seeds are used only for the variance of pixels over noise.
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
        """Distances (absent below two images), then pixel metrics as means over images."""
        result = self._distances(budget, real, kernel_seed, paired=True) | self._means(budget)
        variance = self._originals.variance
        if variance > 0:
            result["mse_over_variance"] = result["mse"] / variance
        return result
