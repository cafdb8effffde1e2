"""Reconstruction quality at several token budgets, accumulated batch by batch and added up over processes.

B images, N of all batches and processes, H x W pixels, D features.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.contracts import GuidanceScale, Reconstructor
from flextok_pl.distributed import all_reduce_sum, gather_objects
from flextok_pl.evaluation.budget_statistics import BudgetStatistics
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.images import image_errors


class PairDistance(Protocol):
    """A distance of each image from another."""

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 twice -> (B,) float64 on the CPU."""


def reconstruct_at_budgets(
    reconstructor: Reconstructor,
    images: Tensor,
    keys: Sequence[str],
    budgets: Sequence[int],
    num_steps: int,
    guidance: str,
    guidance_scale: GuidanceScale,
    seeds: Sequence[int],
) -> Iterator[tuple[int, list[Tensor]]]:
    """Tokenize once, then decode at each budget from the same noise, which is a function of (seed, key) only.

    Args:
        reconstructor: the tokenizer.
        images: (B, 3, H, W) in [-1, 1].
        keys: B sample keys.
        budgets: numbers of tokens.
        num_steps: steps of the flow's solver.
        guidance: `none`, `cfg` or `apg`.
        guidance_scale: its scale.
        seeds: of the noise.

    Yields:
        A budget and, for each seed, its (B, 3, H, W) images, not clamped.
    """
    tokens = reconstructor.tokenize(images, num_tokens=max(budgets))  # (B, max k)
    for budget in budgets:
        images_of_seeds = [
            reconstructor.detokenize(
                tokens,
                num_tokens=budget,
                num_steps=num_steps,
                guidance=guidance,
                guidance_scale=guidance_scale,
                generator=sample_generators(keys, seed),
            )
            for seed in seeds
        ]
        yield budget, images_of_seeds


class ImageMoments:
    """Variance of a set of images around their mean image, in float64, on the [0, 1] scale."""

    def __init__(self) -> None:
        self.count = 0
        self._sum = torch.zeros(0, dtype=torch.float64)
        self._squares = 0.0

    def update(self, images: Tensor) -> None:
        """Add (B, 3, H, W) uint8.

        Raises:
            ValueError: the images have another size than those before.
        """
        if self.count == 0:
            self._sum = torch.zeros(images.shape[1:], dtype=torch.float64)
        self._check_size(images.shape[1:])
        self._sum += images.sum(0, dtype=torch.int64).cpu().double() / 255
        self._squares += float(images.to(torch.int64).square().sum()) / 255**2
        self.count += len(images)

    def all_reduce(self, device: torch.device) -> None:
        """Replace these moments by those of the images of all processes."""
        sizes = [torch.Size(size) for size in gather_objects(tuple(self._sum.shape)) if size != (0,)]
        if not sizes:
            return
        if self.count == 0:
            self._sum = torch.zeros(sizes[0], dtype=torch.float64)
        for size in sizes:
            self._check_size(size)
        self._sum = all_reduce_sum(self._sum, device)
        count, self._squares = all_reduce_sum(
            torch.tensor([self.count, self._squares], dtype=torch.float64), device
        ).tolist()
        self.count = int(count)

    def state_dict(self) -> dict[str, Any]:
        """Plain types and tensors that `load_state_dict` takes."""
        return {"count": self.count, "sum": self._sum, "squares": self._squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what other moments had summed up."""
        self.count, self._sum, self._squares = state["count"], state["sum"], state["squares"]

    @property
    def variance(self) -> float:
        """Mean over pixels and channels of the variance over images (divisor N)."""
        mean = self._sum / self.count
        return self._squares / (self.count * mean.numel()) - float(mean.square().mean())

    @property
    def size(self) -> list[int]:
        """[H, W] of the images."""
        return list(self._sum.shape[1:])

    def _check_size(self, size: torch.Size) -> None:
        if self._sum.shape != size:
            raise ValueError(f"images of {tuple(self._sum.shape)} and {tuple(size)} are mixed; resize them to one size")


class ReconstructionStatistics(BudgetStatistics):
    """Everything that per-budget reconstruction metrics need.

    Args:
        budgets: numbers of tokens.
        extractor: of the features whose distances are taken.
        pool_fraction: share of the samples whose features are kept for the kernel distance.
        perceptual: metric -> distance whose mean over images is taken.
        real: features of all originals from an earlier run, or None to take them now.
    """

    def __init__(
        self,
        budgets: Sequence[int],
        extractor: FeatureExtractor,
        pool_fraction: float = 1.0,
        perceptual: Mapping[str, PairDistance] | None = None,
        real: FeatureSet | None = None,
    ) -> None:
        self._perceptual = dict(perceptual or {})
        names = ("mae", "mse", "psnr", "ssim", *self._perceptual, "seed_variance")
        super().__init__(budgets, extractor, pool_fraction, None, real, names)
        self.images = ImageMoments()

    @property
    def image_size(self) -> list[int]:
        """[H, W] of the images; empty before the first."""
        return self.images.size

    @property
    def how(self) -> dict[str, dict[str, Any]]:
        """Metric -> what its records say of how it was computed."""
        ((name, facts),) = super().how.items()
        return {name: {"kernel": f"{facts['kernel']}, originals and reconstructions paired"}}

    def update_real(self, originals: Tensor, keys: Sequence[str]) -> None:
        """Add (B, 3, H, W) uint8 originals with their keys."""
        self.images.update(originals)
        self._add_real(originals, keys)

    def update_reconstructions(
        self,
        budget: int,
        originals: Tensor,
        reconstructions: Tensor,
        keys: Sequence[str],
        from_other_noise: Sequence[Tensor] = (),
    ) -> dict[str, Tensor]:
        """Add reconstructions at one budget.

        Args:
            budget: number of tokens.
            originals: (B, 3, H, W) uint8.
            reconstructions: (B, 3, H, W) uint8.
            keys: B sample keys.
            from_other_noise: further reconstructions, likewise, for the variance of pixels over noise.

        Returns:
            (B,) values by name.
        """
        errors = image_errors(originals, reconstructions)
        for name, distance in self._perceptual.items():
            errors[name] = distance(originals, reconstructions)
        if from_other_noise:
            levels = torch.stack([reconstructions, *from_other_noise]).cpu().double() / 255
            errors["seed_variance"] = levels.var(0).flatten(1).mean(1)
        for name, values in errors.items():
            self._add_values(budget, name, values)
        self._add_made(budget, self._extractor(reconstructions), keys)
        return errors

    def all_reduce(self, device: torch.device) -> None:
        """Replace these statistics by those of all processes.

        Args:
            device: where the process group communicates.
        """
        self.images.all_reduce(device)
        super().all_reduce(device)

    def state_dict(self) -> dict[str, Any]:
        """Everything measured so far, as plain types and tensors that `load_state_dict` takes."""
        return super().state_dict() | {"images": self.images.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what statistics made with the same arguments had measured."""
        super().load_state_dict(state)
        self.images.load_state_dict(state["images"])

    def values(self, kernel_seed: int = 0) -> dict[int, dict[str, float]]:
        """Metrics by budget: distances first (absent below two images), then pixel metrics as means over images."""
        results: dict[int, dict[str, float]] = {}
        for budget in self.budgets:
            result = self._distances(budget, kernel_seed, paired=True) | self._means(budget)
            if self.images.variance > 0:
                result["mse_over_variance"] = result["mse"] / self.images.variance
            results[budget] = result
        return results


def check_each_sample_once(seen: Tensor, expected: int, may_stop_early: bool, source: str) -> int:
    """Count samples.

    Args:
        seen: (N,) int64, hashes of the keys of all that were seen, by whichever process.
        expected: samples in the data set.
        may_stop_early: whether fewer are in order, because the user limits the number of batches.
        source: what to call the data in an error.

    Returns:
        The number seen.

    Raises:
        RuntimeError: a sample came twice, or some did not come.
    """
    repeated = len(seen) - len(torch.unique(seen))
    if repeated:
        raise RuntimeError(
            f"{repeated} of {len(seen)} samples of {source} repeat a key: a sampler pads ranks, or keys are not "
            "unique; no number is reported"
        )
    if len(seen) > expected or (len(seen) < expected and not may_stop_early):
        raise RuntimeError(
            f"{source} gave {len(seen)} samples, {expected} were expected: evaluation must see each sample exactly "
            "once (no drop_last, no skipped errors); no number is reported"
        )
    return len(seen)
