"""Inception score (Salimans et al., arXiv 1606.03498, section 4), from float64 sums collected in one pass.

The score is exp(E_x KL(p(y|x) || p(y))). E_x KL = H(E_x p) - E_x H(p) needs only the sums of p and of p log p.
S splits, C classes.
"""

import torch
from torch import Tensor

from flextok_pl.distributed import all_reduce_sum
from flextok_pl.precision import as_float64, summing_device


class InceptionScore:
    """The inception score of each of several splits of the samples, and their mean.

    A sample's split is its id modulo S, so the score does not depend on order, batches or processes. Sums are on the
    `summing_device` of `device`, and updates do not wait for it. Reading the sums therefore raises the ValueError for
    invalid probabilities.
    """

    def __init__(self, num_classes: int, splits: int = 10, device: torch.device | str = "cpu") -> None:
        if splits < 1:
            raise ValueError(f"splits={splits} must be at least 1")
        self._device = summing_device(device)
        # Sums of p, of p log p, of ones; NaN for invalid probabilities.
        self._sums = torch.zeros(splits, num_classes + 2, dtype=torch.float64, device=self._device)

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self._checked()[:, -1].sum())

    def update(self, probabilities: Tensor, ids: Tensor) -> None:
        """Add (B, C) probabilities of samples with (B,) int64 ids, which must be uniform, such as hashes of keys."""
        classes = self._sums.shape[1] - 2
        if probabilities.ndim != 2 or probabilities.shape[1] != classes:
            raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}; this score takes (B, {classes})")
        p = as_float64(probabilities.detach()).to(self._device)
        valid = (p >= 0).all(1, keepdim=True) & ((p.sum(1, keepdim=True) - 1).abs() < 1e-3)
        rows = torch.cat([p, -torch.special.entr(p).sum(1, keepdim=True), p.new_ones(len(p), 1)], 1)  # (B, C + 2)
        splits = ids.to(self._device) % len(self._sums)
        self._sums.index_add_(0, splits, rows.where(valid, torch.nan))

    def all_reduce(self) -> None:
        """Merge the samples of all processes."""
        self._sums = all_reduce_sum(self._checked())

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `load_state_dict` takes."""
        return {"sums": self._checked()}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Replace the samples by those of another score with the same arguments."""
        self._sums = state["sums"].to(self._device)

    def _checked(self) -> Tensor:
        if self._sums.isnan().any():
            raise ValueError("probabilities are negative, NaN or do not add up to 1; give the softmax of logits")
        return self._sums

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation (divisor S) over the splits that have samples."""
        if self.count == 0:
            raise ValueError("an inception score needs at least one sample")
        sums = self._checked()
        sums = sums[sums[:, -1] > 0]
        means = sums[:, :-1] / sums[:, -1:]
        scores = (torch.special.entr(means[:, :-1]).sum(1) + means[:, -1]).exp()
        return float(scores.mean()), float(scores.std(correction=0))
