"""Evaluate reconstructions at several token budgets: feature distances, and errors of pixels and perception.

Each image is tokenized once and decoded at every budget from noise that depends on the seed and its key only. So
results do not depend on batch size, workers or ranks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from flextok_pl.backbones.dreamsim import DreamSim
from flextok_pl.backbones.lpips import LPIPS
from flextok_pl.contracts import Reconstructor
from flextok_pl.distributed import gather_objects
from flextok_pl.evaluation.budget_evaluation import (
    BudgetEvaluation,
    Context,
    GridRow,
    first_rows,
    places_of,
    stacked,
)
from flextok_pl.evaluation.options import ReconstructionOptions
from flextok_pl.evaluation.pictures import image_grid, same_size
from flextok_pl.evaluation.reconstruction_statistics import PairDistance, ReconstructionStatistics
from flextok_pl.keys import key_hash
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.images import to_uint8

EXTREMES = 3
"""Images shown from each end."""

ENDS = {"best": 1, "worst": -1}
"""Name of an end -> sign of the error for sorting."""


class ReconstructionEvaluation(BudgetEvaluation):
    """An evaluation of reconstructions; see `BudgetEvaluation`."""

    heading: ClassVar[str] = "reconstructions"
    picture: ClassVar[str] = "grid.png"
    saved: ClassVar[tuple[str, ...]] = ("ids", "rows", "extremes")

    options: ReconstructionOptions
    statistics: ReconstructionStatistics[int]
    extremes: dict[str, list[GridRow]]  # end and budget -> its rows

    def __init__(self, options: ReconstructionOptions, device: torch.device | str = "cpu") -> None:
        super().__init__(options, device)
        self.perceptual: dict[str, PairDistance] = {}
        if options.lpips is not False:
            self.perceptual["lpips"] = LPIPS(None if options.lpips is True else options.lpips).to(self.device)
        if options.dreamsim is not None:
            self.perceptual["dreamsim"] = DreamSim(options.dreamsim, options.dreamsim_weights, self.device)

    def start(self, model: Reconstructor, context: Context) -> None:
        """See `BudgetEvaluation`."""
        self.extremes = {}
        self._start(model, context, {"num_seeds": self.options.num_seeds})

    def _statistics(self, pool_fraction: float, real: FeatureSet | None) -> ReconstructionStatistics[int]:
        return ReconstructionStatistics(self.budgets, self.extractor, pool_fraction, self.perceptual, real)

    def _measure(self, batch: Mapping[str, Any]) -> None:
        images, keys, options = batch["image"], batch["key"], self.options
        if not keys:
            return
        originals = to_uint8(images)
        self.statistics.update_real(originals, keys)
        tokens = self.tokenizer.tokenize(images, num_tokens=self.budgets[-1])  # (B, max k)
        size = list(images.shape[2:])
        seeds = range(options.seed, options.seed + (1 if self.context.in_fit else options.num_seeds))
        decodings = [self._decoded(tokens, keys, self.budgets, seed, size) for seed in seeds]
        shown: dict[int, Tensor] = {}
        errors: dict[int, Tensor] = {}  # squared errors of the shown budgets, (B,)
        for (budget, pixels), *others in zip(*decodings, strict=True):
            from_other_noise = [other for _, other in others]
            measured = self.statistics.update_reconstructions(budget, originals, pixels, keys, from_other_noise)
            if budget in self.columns:
                shown[budget], errors[budget] = pixels, measured["mse"]
        self._keep_pictures(keys, originals, shown, errors)

    def _keep_pictures(
        self, keys: Sequence[str], originals: Tensor, shown: dict[int, Tensor], errors: dict[int, Tensor]
    ) -> None:
        """Keep the first images by key, and those with the smallest and the largest errors so far."""
        orders = [key_hash(key, "grid") for key in keys]
        for i in places_of(self.rows, orders, self.options.grid_samples):
            images = torch.stack([originals[i], *(pixels[i] for pixels in shown.values())]).cpu()
            self.rows.append((orders[i], images[0], dict(zip(shown, images[1:], strict=True))))
        self.rows = first_rows(self.rows, self.options.grid_samples)
        if self.context.in_fit:
            return
        numbers = [key_hash(key) for key in keys]
        for budget, of_all in zip(shown, torch.stack([*errors.values()]).tolist(), strict=True):
            for end, sign in ENDS.items():
                rows = self.extremes.get(f"{end} {budget}", [])
                ends = [(sign * error, number) for error, number in zip(of_all, numbers, strict=True)]
                for i in places_of(rows, ends, EXTREMES):
                    original, made = torch.stack([originals[i], shown[budget][i]]).cpu()
                    rows = [*rows, (ends[i], original, {budget: made})]
                self.extremes[f"{end} {budget}"] = first_rows(rows, EXTREMES)

    def _pictures(self) -> dict[str, Tensor]:
        rows = self._rows_of_all(self.options.grid_samples)
        pictures = {self.picture: image_grid([_originals(rows), *stacked(rows, self.columns)])}
        if not self.context.in_fit:
            parts = gather_objects(self.extremes)
            ends = [f"{end} {budget}" for end in ENDS for budget in self.columns]
            found = {end: first_rows([row for part in parts for row in part.get(end, [])], EXTREMES) for end in ends}
            count = min(len(rows) for rows in found.values())
            columns = []
            for budget in self.columns:
                rows = [row for end in ENDS for row in found[f"{end} {budget}"][:count]]
                columns += [_originals(rows), *stacked(rows, [budget])]
            pictures["extremes.png"] = image_grid(columns, [f"{end} {i + 1}" for end in ENDS for i in range(count)])
        return pictures

    def _measured(self) -> str:
        return f"{self.statistics.num_images} images of {self.context.split}"


def _originals(rows: Sequence[GridRow]) -> tuple[str | int, Tensor]:
    """The first column of a picture."""
    return "original", same_size([original for _, original, _ in rows])
