"""Combine several verifiers, by their ranks or scaled scores among the candidates of a prompt.

V verifiers, B candidates.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from flextok_pl.evaluation.generation import Prompt
from flextok_pl.search.verifier import Context
from flextok_pl.search.verifiers import BaseVerifier

Combination = Literal["rank", "weighted"]


class Ensemble(BaseVerifier):
    """A combination of verifiers. It sees all candidates of a prompt at once, because its scores are relative to them.

    `rank`: each verifier ranks the candidates from 0 for the best, and equal ones share the mean of their ranks. The
    score is 1 - the weighted sum of ranks / its largest possible value. `weighted`: the weighted sum of scores, each
    scaled from 0 for the worst candidate to 1 for the best, or 0 if all are equal.

    Both are published with FlexAR's search (April 2026). That code breaks ties by the order of candidates. It skips a
    verifier that fails, and then gives each of the others the weight of its neighbour.

    Args:
        verifiers: verifiers of different names.
        combination: `rank` or `weighted`.
        weights: positive weights of verifiers by name; 1 for others.

    Raises:
        ValueError: a name is repeated, or a weight is not positive or has no verifier.
    """

    def __init__(
        self,
        verifiers: Sequence[BaseVerifier],
        combination: Combination = "rank",
        weights: Mapping[str, float] | None = None,
    ) -> None:
        names, weights = [each.name for each in verifiers], weights or {}
        super().__init__(f"{combination} of {', '.join(names)}")
        check_weights(names, weights)
        self.verifiers, self.combination = tuple(verifiers), combination
        self.needs_images = any(each.needs_images for each in verifiers)
        self._weights = torch.tensor([weights.get(name, 1.0) for name in names], dtype=torch.float64)

    @property
    def facts(self) -> dict[str, Any]:
        """See `BaseVerifier`."""
        weights = dict(zip((each.name for each in self.verifiers), self._weights.tolist(), strict=True))
        return {**super().facts, "weights": weights, "verifiers": [each.facts for each in self.verifiers]}

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Refuse prompts that any of the verifiers cannot judge."""
        for each in self.verifiers:
            each.check(prompts)

    def _scores(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        single = torch.stack(
            [each.score(images if each.needs_images else None, prompts, context) for each in self.verifiers]
        )  # (V, B)
        combined = torch.empty(len(prompts), dtype=torch.float64)
        keys = [prompt.key for prompt in prompts]
        for key in dict.fromkeys(keys):
            pool = torch.tensor([each == key for each in keys])
            combined[pool] = self._combined(single[:, pool])
        return combined

    def _combined(self, scores: Tensor) -> Tensor:
        """Combine the scores of one prompt's candidates: (V, B) -> (B,)."""
        if self.combination == "rank":
            ranks = torch.stack([mean_ranks(row) for row in scores])
            worst = self._weights.sum() * max(1, scores.shape[1] - 1)
            return 1 - self._weights @ ranks / worst
        for each, row in zip(self.verifiers, scores, strict=True):
            if row.isinf().any():
                raise ValueError(f"verifier={each.name!r} gave an infinite score, which cannot be weighted: use rank")
        low, high = scores.aminmax(dim=1, keepdim=True)
        return self._weights @ torch.where(high > low, (scores - low) / (high - low), 0.0)


def check_weights(names: Sequence[str], weights: Mapping[str, float]) -> None:
    """Refuse repeated verifiers, and weights without a verifier or out of range."""
    repeated = {name for name in names if names.count(name) > 1}
    if repeated:
        raise ValueError(f"verifiers={list(names)} names {', '.join(sorted(repeated))} twice: give each once")
    for name, weight in weights.items():
        if name not in names:
            raise ValueError(
                f"verifier_weights has {name!r}, which is not among verifiers={list(names)}: add or delete it"
            )
        if not 0 < weight < float("inf"):
            raise ValueError(f"verifier_weights has {name}={weight}, which must be positive: leave the verifier out")


def mean_ranks(scores: Tensor) -> Tensor:
    """(B,) -> (B,) float64 ranks, 0 for the largest; equal scores share the mean of their ranks."""
    _, group, counts = torch.unique(-scores, return_inverse=True, return_counts=True)
    first = counts.cumsum(0) - counts
    ranks: Tensor = (first + (counts - 1) / 2).to(torch.float64)[group]
    return ranks
