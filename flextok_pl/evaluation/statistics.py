"""Base of the statistics of reconstructions and generated images: features and means by token budget.

B images, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeVar

import torch
from torch import Tensor

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.distributed import all_reduce_sum, gather_objects, rank, world_size
from flextok_pl.keys import choose_fraction, images_hash, key_hash
from flextok_pl.metrics.feature_set import POOL_SIZE, FeatureSet
from flextok_pl.metrics.frechet import frechet_distance
from flextok_pl.metrics.kernel import KernelReference, kernel_distance, kernel_facts
from flextok_pl.precision import as_float64, summing_device

ON_DEVICE = 2**31
"""Most bytes of scatter matrices and pools on the extractor's device: those of 27 budgets of Inception.

Larger ones are kept on the CPU.
"""

BudgetT = TypeVar("BudgetT")
"""A number of tokens, or another label of a set of made images, such as a number of tokens and a decoding."""


class BudgetStatistics(ABC, Generic[BudgetT]):
    """Features of real images, and for each budget features of made images and sums of values per image.

    The pool fractions are the shares of images whose features are kept for the kernel distance; None uses that of real
    images. `real` has the features of all real images from an earlier run. `names` are the values whose means over
    images are computed. `_further` holds other sums over batches and processes that are saved.

    `several_sizes` allows images of several sizes, which makes sense if each is compared with its own original.

    Sums stay on `home`, so that adding made images does not wait for a device.
    """

    several_sizes: ClassVar[bool] = False

    def __init__(
        self,
        budgets: Sequence[BudgetT],
        extractor: FeatureExtractor,
        pool_fraction: float,
        real_pool_fraction: float | None,
        real: FeatureSet | None,
        names: Sequence[str],
    ) -> None:
        size = (len(budgets) + 1) * extractor.dim * (8 * extractor.dim + 4 * POOL_SIZE)
        self.home = summing_device(extractor.device if size <= ON_DEVICE else "cpu")
        self.real = FeatureSet(extractor.dim, self.home) if real is None else real
        self.made = {budget: FeatureSet(extractor.dim, self.home) for budget in budgets}
        self.data_hash = 0  # of the real images, see `images_hash`
        self.image_sizes: list[list[int]] = []  # [H, W] of images, each size once
        self._extractor = extractor
        self._pool_fraction = pool_fraction
        self._real_pool_fraction = pool_fraction if real_pool_fraction is None else real_pool_fraction
        self._real_is_complete = real is not None
        empty = torch.zeros(2, dtype=torch.float64, device=self.home)  # sum and count
        self._sums = {budget: dict.fromkeys(names, empty) for budget in budgets}
        self._further: dict[str, Any] = {}

    @property
    def image_size(self) -> list[Any]:
        """[H, W] of all images; a list of them for several sizes; empty before the first image."""
        return self.image_sizes[0] if len(self.image_sizes) == 1 else self.image_sizes

    @property
    def num_images(self) -> int:
        """Number of made images for every budget."""
        return min(features.statistics.count for features in self.made.values())

    @property
    def how(self) -> dict[str, dict[str, Any]]:
        """Metric -> facts for its records on how it was computed."""
        smallest = min(features.pool_size for features in (self.real, *self.made.values()))
        return {self._extractor.kernel_metric_name: {"kernel": kernel_facts(smallest)}}

    def values(self, kernel_seed: int = 0) -> dict[BudgetT, dict[str, float]]:
        """Compute metrics by budget; all processes must call it, and each computes those of some budgets."""
        real = KernelReference(self.real.pool().to(self.home))
        mine = list(self.made)[rank() :: world_size()]
        parts = gather_objects({budget: self._values_at(budget, real, kernel_seed) for budget in mine})
        found = {budget: values for part in parts for budget, values in part.items()}
        return {budget: found[budget] for budget in self.made}

    @abstractmethod
    def _values_at(self, budget: BudgetT, real: KernelReference, kernel_seed: int) -> dict[str, float]:
        """Compute metrics at one budget against the pool of real images."""

    def update_real(self, images: Tensor, keys: Sequence[str]) -> None:
        """Add (B, 3, H, W) uint8 real images with their keys."""
        self.check_size(list(images.shape[2:]))
        self.data_hash = images_hash(images, keys, self.data_hash)
        if not self._real_is_complete:
            add_features(self.real, self._extractor(images), keys, self._real_pool_fraction)

    def check_size(self, size: list[int]) -> None:
        """Accept images of this [H, W], if it is not empty; only one size unless `several_sizes`."""
        if size and size not in self.image_sizes:
            if self.image_sizes and not self.several_sizes:
                raise ValueError(f"images of {self.image_size} and {size} pixels are mixed; resize them to one size")
            self.image_sizes = sorted([*self.image_sizes, size])

    def all_reduce(self) -> None:
        """Merge the statistics of all processes."""
        for sizes in gather_objects(self.image_sizes):
            for size in sizes:
                self.check_size(size)
        self.data_hash = int(all_reduce_sum(torch.tensor(self.data_hash)).item())
        if not self._real_is_complete:
            self.real.all_reduce()
            self._real_is_complete = True
        for budget, sums in self._sums.items():
            self._sums[budget] = {name: all_reduce_sum(total) for name, total in sums.items()}
            self.made[budget].all_reduce()
        for each in self._further.values():
            each.all_reduce()

    def state_dict(self) -> dict[str, Any]:
        """Everything measured so far, as plain types and tensors for `load_state_dict`."""
        return {
            "data_hash": self.data_hash,
            "sizes": self.image_sizes,
            "real": None if self._real_is_complete else self.real.state_dict(),
            "made": {budget: features.state_dict() for budget, features in self.made.items()},
            "sums": self._sums,
            "further": {name: each.state_dict() for name, each in self._further.items()},
        }

    def has_all_of(self, state: Mapping[str, Any]) -> bool:
        """Check that the features of real images that a state leaves out are known here."""
        return self._real_is_complete or state["real"] is not None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from saved statistics that were made with the same arguments."""
        self.data_hash, self.image_sizes = state["data_hash"], state["sizes"]
        if not self._real_is_complete:
            self.real = FeatureSet.from_state_dict(state["real"], self.home)
        self.made = {k: FeatureSet.from_state_dict(features, self.home) for k, features in state["made"].items()}
        self._sums = {k: {name: sums.to(self.home) for name, sums in of.items()} for k, of in state["sums"].items()}
        for name, each in self._further.items():
            each.load_state_dict(state["further"][name])

    def _add_values(self, budget: BudgetT, name: str, values: Tensor, count: int | None = None) -> None:
        """Add the values of (B,) images to their sum and count; if only `count` have one, the others are zero."""
        total = as_float64(values.sum()).to(self.home)
        number = torch.full_like(total, len(values) if count is None else count)
        self._sums[budget][name] = self._sums[budget][name] + torch.stack([total, number])

    def _distances(self, budget: BudgetT, real: KernelReference, kernel_seed: int, paired: bool) -> dict[str, float]:
        """Frechet and kernel distance from the real images, each only with two samples on each side."""
        made, distances = self.made[budget], {}
        if min(self.real.statistics.count, made.statistics.count) > 1:
            distances[self._extractor.metric_name] = frechet_distance(self.real.statistics, made.statistics)
        pool = made.pool()
        if min(len(real.features), len(pool)) > 1:
            kernel, _ = kernel_distance(real, pool, seed=kernel_seed, paired=paired)
            distances[self._extractor.kernel_metric_name] = kernel
        return distances

    def _means(self, budget: BudgetT) -> dict[str, float]:
        """Mean of each value that at least one image has."""
        totals = {name: total.tolist() for name, total in self._sums[budget].items()}
        return {name: total / count for name, (total, count) in totals.items() if count}


def add_features(features: FeatureSet, rows: Tensor, keys: Sequence[str], pool_fraction: float) -> Tensor:
    """Add (B, D) to one of the sets, and return the (B,) int64 ids of the keys."""
    ids = torch.tensor([key_hash(key) for key in keys], dtype=torch.int64)
    features.update(rows, ids, choose_fraction(keys, pool_fraction, "pool"))
    return ids


def check_each_sample_once(seen: Tensor, expected: int, may_stop_early: bool, source: str) -> int:
    """Count samples by their hashed keys (N,) int64 from all processes, and refuse repeated or missing ones."""
    repeated = len(seen) - len(torch.unique(seen))
    if repeated:
        raise RuntimeError(
            f"{repeated} of {len(seen)} samples of {source} repeat a key: a sampler pads ranks, or keys are not "
            "unique; no number is reported"
        )
    if len(seen) > expected or (len(seen) < expected and not may_stop_early):
        raise RuntimeError(
            f"{source} gave {len(seen)} samples instead of {expected}: evaluation must see each sample exactly "
            "once (no drop_last, no skipped errors); no number is reported"
        )
    return len(seen)
