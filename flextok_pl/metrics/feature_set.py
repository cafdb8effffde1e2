"""Collect what distances need of a set of images: statistics of all features, and a pool of features.

M pooled samples, D features.
"""

from typing import Self

import torch
from torch import Tensor

from flextok_pl.distributed import gather_rows
from flextok_pl.metrics.frechet import FeatureStatistics
from flextok_pl.transfer import send

POOL_SIZE = 5000  # most samples whose features are kept for the kernel distance


class FeatureSet:
    """Features of one set of images, on the `summing_device` of `device`; adding to it does not wait for the device."""

    def __init__(self, dim: int, device: torch.device | str = "cpu") -> None:
        self.statistics = FeatureStatistics(dim, device)
        self._rows: list[Tensor] = []
        self._ids: list[Tensor] = []  # on the CPU

    def update(self, features: Tensor, ids: Tensor, pooled: Tensor) -> None:
        """Add (B, D) features of samples with (B,) int64 ids, unique in the set and the same in every process.

        `pooled` (B,) marks the samples of the pool; ids and pooled are on the CPU.
        """
        rows = features.to(self.device)
        self.statistics.update(rows)
        if not pooled.all():
            rows = rows[send(pooled.nonzero().flatten(), rows.device)]
        self._rows.append(rows)
        self._ids.append(ids[pooled])

    @property
    def device(self) -> torch.device:
        """The device of the features."""
        return self.statistics.mean.device

    @property
    def pool_size(self) -> int:
        """M."""
        return sum(map(len, self._ids))

    def pool(self) -> Tensor:
        """(M, D), ordered by id, so that it does not depend on processes or their order."""
        rows, ids = self._joined()
        return rows[ids.argsort()]

    def all_reduce(self) -> None:
        """Merge the sets of all processes into this one."""
        self.statistics.all_reduce()
        rows, ids = self._joined()
        self._rows, self._ids = [gather_rows(rows)], [gather_rows(ids)]

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `from_state_dict` takes."""
        rows, ids = self._joined()
        return {**self.statistics.state_dict(), "rows": rows, "ids": ids}

    @classmethod
    def from_state_dict(cls, state: dict[str, Tensor], device: torch.device | str = "cpu") -> Self:
        """Restore a set from its `state_dict`."""
        restored = cls(len(state["mean"]), device)
        restored.statistics = FeatureStatistics.from_state_dict(state, device)
        restored._rows, restored._ids = [state["rows"].to(restored.device)], [state["ids"]]
        return restored

    def _joined(self) -> tuple[Tensor, Tensor]:
        if not self._rows:
            return torch.zeros(0, self.statistics.dim, device=self.device), torch.zeros(0, dtype=torch.int64)
        return torch.cat(self._rows), torch.cat(self._ids)
