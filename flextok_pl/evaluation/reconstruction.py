"""Reconstructions at several token budgets: feature distances, and errors of pixels and perception.

Each image is tokenized once and decoded at every budget from noise that depends on the seed and its key only, so that
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
from flextok_pl.evaluation.budget_evaluation import BudgetEvaluation, Context, GridRow, decode, first_rows, stacked
from flextok_pl.evaluation.options import ReconstructionOptions
from flextok_pl.evaluation.pictures import image_grid
from flextok_pl.evaluation.reconstruction_statistics import PairDistance, ReconstructionStatistics
from flextok_pl.keys import key_hash
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.images import to_uint8

EXTREMES = 3
"""Images shown from either end."""

ENDS = {"best": 1, "worst": -1}
"""Name -> sign of the error by which they are ordered."""


class ReconstructionEvaluation(BudgetEvaluation):
    """An evaluation of reconstructions; see `BudgetEvaluation`."""

    heading: ClassVar[str] = "reconstructions"
    picture: ClassVar[str] = "grid.png"
    saved: ClassVar[tuple[str, ...]] = ("ids", "rows", "extremes")

    options: ReconstructionOptions
    statistics: ReconstructionStatistics[int]
    extremes: dict[str, list[GridRow]]  # end and budget -> the rows of which it is the end

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
        seeds = range(options.seed, options.seed + (1 if self.context.in_fit else options.num_seeds))
        shown: dict[int, Tensor] = {}
        for budget in self.budgets:
            pixels, *others = (decode(self.tokenizer, tokens, budget, options.decoding, keys, seed) for seed in seeds)
            self.context.pause()
            errors = self.statistics.update_reconstructions(budget, originals, pixels, keys, others)
            if budget in self.columns:
                shown[budget] = pixels
                if not self.context.in_fit:
                    self._keep_extremes(budget, errors["mse"].tolist(), keys, originals, pixels)
        rows = [
            (key_hash(key, "grid"), originals[i].cpu(), {budget: pixels[i].cpu() for budget, pixels in shown.items()})
            for i, key in enumerate(keys)
        ]
        self.rows = first_rows(self.rows + rows, options.grid_samples)

    def _keep_extremes(
        self, budget: int, errors: Sequence[float], keys: Sequence[str], originals: Tensor, pixels: Tensor
    ) -> None:
        """Keep the images with the smallest and the largest errors of those seen so far."""
        for end, sign in ENDS.items():
            name = f"{end} {budget}"
            order = sorted((sign * errors[i], key_hash(key), i) for i, key in enumerate(keys))[:EXTREMES]
            rows = [((error, key), originals[i].cpu(), {budget: pixels[i].cpu()}) for error, key, i in order]
            self.extremes[name] = first_rows(self.extremes.get(name, []) + rows, EXTREMES)

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
    return "original", torch.stack([original for _, original, _ in rows])
