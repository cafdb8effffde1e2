"""Inception score (Salimans et al., arXiv 1606.03498, section 4), from float64 sums kept in one pass.

exp(E_x KL(p(y|x) || p(y))), where E_x KL = H(E_x p) - E_x H(p) needs the sums of p and of p log p only.
S splits, C classes.
"""

import torch
from torch import Tensor

from flextok_pl.distributed import all_reduce_sum


class InceptionScore:
    """The score of each of several parts of the samples, and their mean.

    A sample's split is its id modulo S, so the score depends neither on order nor on batches or processes.
    """

    def __init__(self, num_classes: int, splits: int = 10) -> None:
        if splits < 1:
            raise ValueError(f"splits={splits} must be at least 1")
        self._sums = torch.zeros(splits, num_classes + 2, dtype=torch.float64)  # of p, of p log p, of ones

    @property
    def count(self) -> int:
        """Number of samples."""
        return int(self._sums[:, -1].sum())

    def update(self, probabilities: Tensor, ids: Tensor) -> None:
        """Add (B, C) probabilities of samples with (B,) int64 ids, uniform over the integers, as hashes of keys are."""
        classes = self._sums.shape[1] - 2
        if probabilities.ndim != 2 or probabilities.shape[1] != classes:
            raise ValueError(f"probabilities have shape {tuple(probabilities.shape)}; this score takes (B, {classes})")
        p = probabilities.detach().cpu().double()
        if not ((p >= 0).all() and ((p.sum(1) - 1).abs() < 1e-3).all()):
            raise ValueError("probabilities are negative, NaN or do not add up to 1; give the softmax of logits")
        rows = torch.cat([p, -torch.special.entr(p).sum(1, keepdim=True), p.new_ones(len(p), 1)], 1)  # (B, C + 2)
        self._sums.index_add_(0, ids.cpu() % len(self._sums), rows)

    def all_reduce(self) -> None:
        """Replace the samples by those of all processes."""
        self._sums = all_reduce_sum(self._sums)

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors that `load_state_dict` takes."""
        return {"sums": self._sums}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Take up the samples of another score with the same arguments."""
        self._sums = state["sums"]

    def compute(self) -> tuple[float, float]:
        """Mean and standard deviation (divisor S) over the splits that have samples."""
        if self.count == 0:
            raise ValueError("an inception score needs at least one sample")
        sums = self._sums[self._sums[:, -1] > 0]
        means = sums[:, :-1] / sums[:, -1:]
        scores = (torch.special.entr(means[:, :-1]).sum(1) + means[:, -1]).exp()
        return float(scores.mean()), float(scores.std(correction=0))
