"""What reconstructions and generated images have in common: features and means by token budget, beside real features.

B images, D features.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.distributed import all_reduce_sum, gather_objects
from flextok_pl.keys import choose_fraction, images_hash, key_hash
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.frechet import frechet_distance
from flextok_pl.metrics.kernel import kernel_distance, kernel_facts

BudgetT = TypeVar("BudgetT")
"""A number of tokens; or what else tells sets of made images apart, such as a number of tokens and how to decode it."""


class BudgetStatistics(ABC, Generic[BudgetT]):
    """Features of real images, and at each budget features of made images and sums of values per image.

    The pool fractions are the shares of images whose features are kept for the kernel distance; None is the same for
    real images. `real` has the features of all real images from an earlier run. `names` are those of the values whose
    means over images are taken, and `further` is what else is summed up over batches and processes, and saved.
    """

    def __init__(
        self,
        budgets: Sequence[BudgetT],
        extractor: FeatureExtractor,
        pool_fraction: float,
        real_pool_fraction: float | None,
        real: FeatureSet | None,
        names: Sequence[str],
        further: Mapping[str, Any],
    ) -> None:
        self.real = FeatureSet(extractor.dim) if real is None else real
        self.made = {budget: FeatureSet(extractor.dim) for budget in budgets}
        self.data_hash = 0  # of the real images, see `images_hash`
        self.image_size: list[int] = []  # [H, W] of all images; empty before the first
        self._extractor = extractor
        self._pool_fraction = pool_fraction
        self._real_pool_fraction = pool_fraction if real_pool_fraction is None else real_pool_fraction
        self._real_is_complete = real is not None
        self._sums = {budget: {name: torch.zeros(2, dtype=torch.float64) for name in names} for budget in budgets}
        self._further = further

    @property
    def num_images(self) -> int:
        """Made images that every budget has."""
        return min(features.statistics.count for features in self.made.values())

    @property
    def how(self) -> dict[str, dict[str, Any]]:
        """Metric -> what its records say of how it was computed."""
        smallest = min(features.pool_size for features in (self.real, *self.made.values()))
        return {self._extractor.kernel_metric_name: {"kernel": kernel_facts(smallest)}}

    @abstractmethod
    def values(self, kernel_seed: int = 0) -> dict[BudgetT, dict[str, float]]:
        """Metrics by budget."""

    def update_real(self, images: Tensor, keys: Sequence[str]) -> None:
        """Add (B, 3, H, W) uint8 real images with their keys."""
        self.check_size(list(images.shape[2:]))
        self.data_hash = images_hash(images, keys, self.data_hash)
        if not self._real_is_complete:
            add_features(self.real, self._extractor(images), keys, self._real_pool_fraction)

    def check_size(self, size: list[int]) -> None:
        """Take only images of this [H, W], where it is not empty."""
        if self.image_size and size and self.image_size != size:
            raise ValueError(f"images of {self.image_size} and {size} pixels are mixed; resize them to one size")
        self.image_size = self.image_size or size

    def all_reduce(self) -> None:
        """Replace these statistics by those of all processes."""
        for size in gather_objects(self.image_size):
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
        """Everything measured so far, as plain types and tensors that `load_state_dict` takes."""
        return {
            "data_hash": self.data_hash,
            "size": self.image_size,
            "real": None if self._real_is_complete else self.real.state_dict(),
            "made": {budget: features.state_dict() for budget, features in self.made.items()},
            "sums": self._sums,
            "further": {name: each.state_dict() for name, each in self._further.items()},
        }

    def has_all_of(self, state: Mapping[str, Any]) -> bool:
        """Whether the features of real images that a state leaves out are known here."""
        return self._real_is_complete or state["real"] is not None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what statistics made with the same arguments had measured."""
        self.data_hash, self.image_size = state["data_hash"], state["size"]
        if not self._real_is_complete:
            self.real = FeatureSet.from_state_dict(state["real"])
        self.made = {budget: FeatureSet.from_state_dict(features) for budget, features in state["made"].items()}
        self._sums = state["sums"]
        for name, each in self._further.items():
            each.load_state_dict(state["further"][name])

    def _add_values(self, budget: BudgetT, name: str, values: Tensor) -> None:
        """Add the values of (B,) images to their sum and count."""
        self._sums[budget][name] += torch.tensor([float(values.sum()), len(values)], dtype=torch.float64)

    def _distances(self, budget: BudgetT, kernel_seed: int, paired: bool) -> dict[str, float]:
        """Frechet and kernel distance from the real images, each only where it has two samples on either side."""
        made, distances = self.made[budget], {}
        if min(self.real.statistics.count, made.statistics.count) > 1:
            distances[self._extractor.metric_name] = frechet_distance(self.real.statistics, made.statistics)
        real_pool, pool = self.real.pool(), made.pool()
        if min(len(real_pool), len(pool)) > 1:
            kernel, _ = kernel_distance(real_pool, pool, seed=kernel_seed, paired=paired)
            distances[self._extractor.kernel_metric_name] = kernel
        return distances

    def _means(self, budget: BudgetT) -> dict[str, float]:
        """Mean of each value that any image has."""
        totals = {name: total.tolist() for name, total in self._sums[budget].items()}
        return {name: total / count for name, (total, count) in totals.items() if count}


def add_features(features: FeatureSet, rows: Tensor, keys: Sequence[str], pool_fraction: float) -> Tensor:
    """Add (B, D) to one of the sets, and return the (B,) int64 ids that the keys stand for."""
    ids = torch.tensor([key_hash(key) for key in keys], dtype=torch.int64)
    features.update(rows, ids, choose_fraction(keys, pool_fraction, "pool"))
    return ids


def check_each_sample_once(seen: Tensor, expected: int, may_stop_early: bool, source: str) -> int:
    """Count the samples, whose hashed keys (N,) int64 all processes have seen, and refuse repeated or missing ones."""
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
