"""Reconstruction quality at every token budget, during a fit and in a test."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from flextok_pl.backbones.dreamsim import DreamSim, check_dreamsim
from flextok_pl.backbones.extractors import OFFLINE_EXTRACTOR, FeatureExtractor
from flextok_pl.backbones.lpips import LPIPS
from flextok_pl.callbacks.budget_evaluation import BudgetEvaluation
from flextok_pl.callbacks.evaluation import module_reconstructor
from flextok_pl.distributed import gather_objects
from flextok_pl.evaluation.pictures import image_grid
from flextok_pl.evaluation.reconstruction import PairDistance, ReconstructionStatistics, reconstruct_at_budgets
from flextok_pl.evaluation.running import Pass, first_rows
from flextok_pl.keys import key_hash
from flextok_pl.metrics.feature_set import FeatureSet
from flextok_pl.metrics.images import to_uint8
from flextok_pl.runtime import stop_if_preempted

EXTREMES = 3
"""Images shown from either end."""

ENDS = {"best": 1, "worst": -1}
"""Name -> sign of the error by which they are ordered."""


class ReconstructionFID(BudgetEvaluation[ReconstructionStatistics]):
    """Measure reconstructions at several token budgets: feature distances, and errors of pixels and perception.

    Errors are MAE, MSE, PSNR and SSIM, and LPIPS and DreamSim where they are asked for.

    Works on any module with a `reconstructor` that can tokenize and detokenize. Each image is tokenized once and
    decoded at every budget from noise that depends on `seed` and its key only, so results do not depend on batch size,
    workers or ranks.

    `trainer.validate` and `trainer.test` measure the full grid on all samples and leave `rfid.json` (one record per
    number, with its protocol), `rfid.csv`, `rfid.png`, `grid.png`, and `extremes.png` with the images whose squared
    error is smallest and largest at each budget. Validations of a fit measure a cheap subset, for the logger,
    `rfid_fit/rfid.json` and `rfid_fit/grid.png`.

    Args:
        budgets: numbers of tokens of the full grid: a list, `all` for 1 to K, or null for the powers of two up to K.
        fit_budgets: those measured during a fit; null for the smallest, the middle and the largest of `budgets`.
        extractor: feature network: `effnet-lite0` (offline), `inception-v3-compat` (rFID), `dinov2-*` or `clip-*`.
        weights: a local file with the extractor's weights; null for the packaged or downloaded ones. CLIP's is OpenAI's
            own file and no other, since it is a program.
        num_steps: steps of the flow's solver.
        guidance: `none`, `cfg` or `apg`.
        guidance_scale: its scale; 1 is no guidance.
        lpips: true for LPIPS with downloaded AlexNet weights, or a path to them; needs images of 32 px or more.
        dreamsim: `ensemble` for DreamSim as in its paper, or another network of the package `dreamsim`; null for none.
        dreamsim_weights: the folder with its unpacked weights; null for the downloaded ones.
        num_seeds: outside a fit, decode from this many seeds; above 1 the pixels' mean variance over them is measured,
            all else on the first.
        every_n_validations: during a fit, measure in every n-th validation; 0 for never.
        max_samples: during a fit, measure about this many samples, a fixed choice by key; null for all.
        seed: of the noise and of the kernel distance's subsets.
        grid_samples: rows of the grid picture, a fixed choice by key.
        output_dir: where files go; null for the trainer's log directory.
        cache_dir: where statistics of real images are kept between runs, under a hash of data and extractor; null for
            nowhere. Needs a data module with `data_hash(split)`.
        save_every_minutes: how often a test, or a validation outside a fit, stores its state in `cache_dir`, where it
            goes on when it was killed and is started again; null for never.
        every_n_epochs: the former name of `every_n_validations`.

    Raises:
        ValueError: an option is out of range, or names what is not there.
    """

    stem: ClassVar[str] = "rfid"
    picture: ClassVar[str] = "grid.png"
    heading: ClassVar[str] = "reconstructions"

    def __init__(
        self,
        budgets: list[int] | Literal["all"] | None = None,
        fit_budgets: list[int] | None = None,
        extractor: str = OFFLINE_EXTRACTOR,
        weights: Path | str | None = None,
        num_steps: int = 25,
        guidance: Literal["none", "cfg", "apg"] = "none",
        guidance_scale: float = 1.0,
        lpips: bool | Path | str = False,
        dreamsim: str | None = None,
        dreamsim_weights: Path | str | None = None,
        num_seeds: int = 1,
        every_n_validations: int = 1,
        max_samples: int | None = 256,
        seed: int = 0,
        grid_samples: int = 8,
        output_dir: Path | str | None = None,
        cache_dir: Path | str | None = "~/.cache/flextok_pl/statistics",
        save_every_minutes: float | None = 5.0,
        every_n_epochs: int | None = None,
    ) -> None:
        super().__init__(
            budgets,
            fit_budgets,
            extractor,
            weights,
            num_steps,
            guidance,
            guidance_scale,
            every_n_validations,
            max_samples,
            seed,
            grid_samples,
            output_dir,
            cache_dir,
            save_every_minutes,
            every_n_epochs,
        )
        if num_seeds < 1:
            raise ValueError(f"num_seeds={num_seeds} must be at least 1")
        check_dreamsim(dreamsim, dreamsim_weights)
        self.lpips, self.num_seeds = lpips, num_seeds
        self.dreamsim, self.dreamsim_weights = dreamsim, dreamsim_weights
        self._lpips: LPIPS | None = None
        self._dreamsim: DreamSim | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks that measure, so that missing weights stop a run before it starts."""
        super().setup(trainer, pl_module, stage)
        if self._network is None:
            return
        if self.lpips is not False and self._lpips is None:
            self._lpips = LPIPS(None if self.lpips is True else self.lpips)
        if self.dreamsim is not None and self._dreamsim is None:
            self._dreamsim = DreamSim(self.dreamsim, self.dreamsim_weights, trainer.strategy.root_device)

    def _check_module(self, pl_module: LightningModule) -> None:
        module_reconstructor(pl_module)

    def _statistics(
        self,
        budgets: list[int],
        network: FeatureExtractor,
        num_made: float,
        real_pool_fraction: float,
        real: FeatureSet | None,
    ) -> ReconstructionStatistics:
        asked: dict[str, PairDistance | None] = {"lpips": self._lpips, "dreamsim": self._dreamsim}
        perceptual = {name: distance for name, distance in asked.items() if distance is not None}
        return ReconstructionStatistics(budgets, network, real_pool_fraction, perceptual, real)

    def _measure(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        batch: Mapping[str, Any],
        running: Pass[ReconstructionStatistics],
    ) -> None:
        images, keys = batch["image"], batch["key"]
        if not keys:
            return
        if self._lpips is not None:
            self._lpips.to(images.device)
        originals = to_uint8(images)
        running.statistics.update_real(originals, keys)
        shown: dict[int, Tensor] = {}
        seeds = range(self.seed, self.seed + (1 if running.in_fit else self.num_seeds))
        for budget, decoded in reconstruct_at_budgets(
            module_reconstructor(pl_module),
            images,
            keys,
            running.budgets,
            self.num_steps,
            self.guidance,
            self.guidance_scale,
            seeds,
        ):
            stop_if_preempted(trainer)
            pixels, *others = (to_uint8(each) for each in decoded)
            errors = running.statistics.update_reconstructions(budget, originals, pixels, keys, others)
            if budget in running.columns:
                shown[budget] = pixels
                if not running.in_fit:
                    _keep_extremes(running, budget, errors["mse"].tolist(), keys, originals, pixels)
        rows = [
            (key_hash(key, "grid"), originals[i].cpu(), {budget: pixels[i].cpu() for budget, pixels in shown.items()})
            for i, key in enumerate(keys)
        ]
        running.grid = first_rows(running.grid + rows, self.grid_samples)

    def _grid(self, done: Pass[ReconstructionStatistics]) -> Tensor:
        rows = first_rows([row for part in gather_objects(done.grid) for row in part], self.grid_samples)
        columns = [(budget, torch.stack([shown[budget] for *_, shown in rows])) for budget in done.columns]
        return image_grid([("original", torch.stack([original for _, original, _ in rows])), *columns])

    def _further_pictures(self, done: Pass[ReconstructionStatistics]) -> dict[str, Tensor]:
        parts = gather_objects(done.extremes)
        ends = [f"{end} {budget}" for end in ENDS for budget in done.columns]
        rows = {end: first_rows([row for part in parts for row in part.get(end, [])], EXTREMES) for end in ends}
        count = min(len(found) for found in rows.values())
        columns: list[tuple[str | int, Tensor]] = []
        for budget in done.columns:
            chosen = [row for end in ENDS for row in rows[f"{end} {budget}"][:count]]
            columns.append(("original", torch.stack([original for _, original, _ in chosen])))
            columns.append((budget, torch.stack([shown[budget] for *_, shown in chosen])))
        return {"extremes.png": image_grid(columns, [f"{end} {i + 1}" for end in ENDS for i in range(count)])}

    def _protocol(self) -> dict[str, Any]:
        return {"num_seeds": self.num_seeds}

    def _notes(self, done: Pass[ReconstructionStatistics]) -> tuple[str, dict[str, dict[str, Any]]]:
        extra: dict[str, dict[str, Any]] = {}
        if self._lpips is not None:
            extra["lpips"] = {"lpips_network": "alex", "lpips_weights_hash": self._lpips.weights_hash}
        if self._dreamsim is not None:
            hash_ = self._dreamsim.weights_hash
            extra["dreamsim"] = {"dreamsim_network": self._dreamsim.name, "dreamsim_weights_hash": hash_}
        return f"{done.statistics.num_images} images of {done.split}", extra


def _keep_extremes(
    running: Pass[ReconstructionStatistics],
    budget: int,
    errors: Sequence[float],
    keys: Sequence[str],
    originals: Tensor,
    pixels: Tensor,
) -> None:
    """Keep the images with the smallest and the largest errors of those seen so far."""
    for end, sign in ENDS.items():
        name = f"{end} {budget}"
        order = sorted(range(len(keys)), key=lambda i: (sign * errors[i], key_hash(keys[i])))[:EXTREMES]
        rows = [((sign * errors[i], key_hash(keys[i])), originals[i].cpu(), {budget: pixels[i].cpu()}) for i in order]
        running.extremes[name] = first_rows(running.extremes.get(name, []) + rows, EXTREMES)
