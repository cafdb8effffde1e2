"""Reconstruction quality at every token budget, during a fit and in a test."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flextok_pl.callbacks.evaluation import (
    batch_images,
    chart_budgets,
    checkpoint_facts,
    evaluated_step,
    log_evaluation,
    module_reconstructor,
    split_size,
    versions,
    weights_in_use,
)
from flextok_pl.contracts import default_budgets
from flextok_pl.metrics.distributed import all_agree, gather_objects
from flextok_pl.metrics.feature_set import POOL_SIZE
from flextok_pl.metrics.features import OFFLINE_EXTRACTOR, FeatureExtractor, build_extractor, check_extractor
from flextok_pl.metrics.images import reconstruction_grid, save_png, to_uint8
from flextok_pl.metrics.keys import choose_fraction, key_hash
from flextok_pl.metrics.lpips import LPIPS
from flextok_pl.metrics.reconstruction import (
    ReconstructionStatistics,
    check_each_sample_once,
    reconstruct_at_budgets,
)
from flextok_pl.metrics.report import format_table, make_records, plot_budgets, write_csv, write_json
from flextok_pl.metrics.statistics_cache import StatisticsCache

GRID_COLUMNS = 12
"""Most columns of reconstructions in the grid picture; beyond, powers of two are shown."""

GridRow = tuple[int, Tensor, dict[int, Tensor]]
"""The hash of a sample's key, its original, and its reconstructions by budget, all (3, H, W) uint8."""


@dataclass
class _Pass:
    """One evaluation of the data, from its first batch to the report."""

    split: Literal["val", "test"]
    in_fit: bool
    budgets: list[int]
    expected: int
    fraction: float
    cache: StatisticsCache | None
    statistics: ReconstructionStatistics
    weights: str
    ids: list[int] = field(default_factory=list)
    grid: list[GridRow] = field(default_factory=list)


class ReconstructionFID(Callback):
    """Measure reconstructions at several token budgets: feature distances, MAE, MSE, PSNR, SSIM, and LPIPS on request.

    Works on any module with a `reconstructor` that can tokenize and detokenize. Each image is tokenized once and
    decoded at every budget from noise that depends on `seed` and its key only, so results do not depend on batch size,
    workers or ranks.

    `trainer.validate` and `trainer.test` measure the full grid on all samples and leave `rfid.json` (one record per
    number, with its protocol), `rfid.csv`, `rfid.png` and `grid.png`. Validations of a fit measure a cheap subset, for
    the logger, `rfid_fit/rfid.json` and `rfid_fit/grid.png`. All work is done while batches are evaluated, because
    Lightning's weight averaging swaps the raw weights back at the end of the epoch.

    Args:
        budgets: numbers of tokens of the full grid: a list, `all` for 1 to K, or null for the powers of two up to K.
        fit_budgets: those measured during a fit; null for the smallest, the middle and the largest of `budgets`.
        extractor: feature network: `effnet-lite0` (offline), `inception-v3-compat` (rFID), `dinov2-*` or `clip-*`.
        weights: a local file with the extractor's weights; null for the packaged or downloaded ones.
        num_steps: steps of the flow's solver.
        guidance: `none`, `cfg` or `apg`.
        guidance_scale: its scale; 1 is no guidance.
        lpips: true for LPIPS with downloaded AlexNet weights, or a path to them; needs images of 32 px or more.
        every_n_epochs: during a fit, measure in the validations of every n-th epoch; 0 for never.
        max_samples: during a fit, measure about this many samples, a fixed choice by key; null for all.
        seed: of the noise and of the kernel distance's subsets.
        grid_samples: rows of the grid picture, a fixed choice by key.
        output_dir: where files go; null for the trainer's log directory.
        cache_dir: where statistics of real images are kept between runs, under a hash of data and extractor; null for
            nowhere. Needs a data module with `data_hash(split)`.

    Raises:
        ValueError: an option is out of range, or names what is not there.
    """

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
        every_n_epochs: int = 1,
        max_samples: int | None = 256,
        seed: int = 0,
        grid_samples: int = 8,
        output_dir: Path | str | None = None,
        cache_dir: Path | str | None = "~/.cache/flextok_pl/statistics",
    ) -> None:
        check_extractor(extractor, weights)
        for name, given in (("budgets", budgets), ("fit_budgets", fit_budgets)):
            if isinstance(given, list) and (not given or min(given) < 1 or len(set(given)) < len(given)):
                raise ValueError(f"{name}={given} must be different positive numbers of tokens")
        if isinstance(budgets, str) and budgets != "all":
            raise ValueError(f"budgets={budgets!r} must be a list of numbers, 'all' or null")
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("every_n_epochs", every_n_epochs, 0),
            ("max_samples", max_samples, 1),
            ("grid_samples", grid_samples, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if guidance not in ("none", "cfg", "apg"):
            raise ValueError(f"guidance={guidance!r} must be 'none', 'cfg' or 'apg'")
        if guidance == "none" and guidance_scale != 1.0:
            raise ValueError(f"guidance_scale={guidance_scale} has no effect with guidance='none'; choose cfg or apg")
        self.budgets, self.fit_budgets = budgets, fit_budgets
        self.extractor, self.weights, self.lpips = extractor, weights, lpips
        self.num_steps, self.guidance, self.guidance_scale = num_steps, guidance, guidance_scale
        self.every_n_epochs, self.max_samples, self.seed = every_n_epochs, max_samples, seed
        self.grid_samples = grid_samples
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.values: dict[int, dict[str, float]] = {}
        """Budget -> metric -> value of the latest evaluation."""
        self._network: FeatureExtractor | None = None
        self._perceptual: LPIPS | None = None
        self._checkpoint: dict[str, Any] | None = None
        self._pass: _Pass | None = None
        self._charted: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks that measure, so that missing weights stop a run before it starts."""
        self._checkpoint = None
        if stage == "predict" or (stage == "fit" and self.every_n_epochs == 0):
            return
        self._network = self._network or build_extractor(self.extractor, self.weights)
        if self.lpips is not False and self._perceptual is None:
            self._perceptual = LPIPS(None if self.lpips is True else self.lpips)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what says which weights are evaluated, and at which step."""
        self._checkpoint = checkpoint_facts(checkpoint)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module that cannot reconstruct before time is spent on it."""
        if self.every_n_epochs:
            module_reconstructor(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        in_fit = trainer.state.fn == TrainerFn.FITTING
        due = not in_fit or (self.every_n_epochs and (trainer.current_epoch + 1) % self.every_n_epochs == 0)
        self._pass = self._start(trainer, pl_module, "val") if due and not trainer.sanity_checking else None

    def on_test_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        self._pass = self._start(trainer, pl_module, "test")

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Reconstruct and measure one batch."""
        if self._pass is not None:
            self._measure(trainer, pl_module, batch, dataloader_idx, self._pass)

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up all processes and report."""
        if self._pass is not None:
            self._finish(trainer, pl_module, self._pass)
            self._pass = None

    on_test_epoch_end = on_validation_epoch_end

    def _start(self, trainer: Trainer, pl_module: LightningModule, split: Literal["val", "test"]) -> _Pass:
        in_fit = trainer.state.fn == TrainerFn.FITTING
        budgets = self._budgets(module_reconstructor(pl_module).num_registers, in_fit)
        expected = split_size(trainer, split)
        fraction = min(1.0, self.max_samples / expected) if in_fit and self.max_samples else 1.0
        pool_fraction = min(1.0, POOL_SIZE / (expected * fraction))
        assert self._network is not None
        network = self._network.to(pl_module.device)
        perceptual = None if self._perceptual is None else self._perceptual.to(pl_module.device)
        cache, real = None, None
        data = trainer.datamodule  # type: ignore[attr-defined]
        if self.cache_dir is not None and hasattr(data, "data_hash"):
            cache = StatisticsCache(
                self.cache_dir, data.data_hash(split), network, samples=expected, share=fraction, pool=pool_fraction
            )
            if all_agree(cache.exists(), trainer.strategy.root_device):
                real = cache.load()
        statistics = ReconstructionStatistics(budgets, network, pool_fraction, perceptual, real)
        weights = weights_in_use(trainer, self._checkpoint)
        return _Pass(split, in_fit, budgets, expected, fraction, cache, statistics, weights)

    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, dataloader_idx: int, running: _Pass
    ) -> None:
        images, keys = batch_images(batch, dataloader_idx)
        running.ids += [key_hash(key) for key in keys]
        chosen = choose_fraction(keys, running.fraction, "subset")
        keys = [key for key, keep in zip(keys, chosen.tolist(), strict=True) if keep]
        if not keys:
            return
        images = images[chosen.to(images.device)]
        originals = to_uint8(images)
        running.statistics.update_originals(originals, keys)
        shown: dict[int, Tensor] = {}
        with trainer.precision_plugin.forward_context():
            for budget, decoded in reconstruct_at_budgets(
                module_reconstructor(pl_module),
                images,
                keys,
                running.budgets,
                self.num_steps,
                self.guidance,
                self.guidance_scale,
                self.seed,
            ):
                pixels = to_uint8(decoded)
                running.statistics.update_reconstructions(budget, originals, pixels, keys)
                if budget in _grid_columns(running.budgets):
                    shown[budget] = pixels
        rows = [
            (key_hash(key, "grid"), originals[i].cpu(), {budget: pixels[i].cpu() for budget, pixels in shown.items()})
            for i, key in enumerate(keys)
        ]
        running.grid = _first_rows(running.grid + rows, self.grid_samples)

    def _finish(self, trainer: Trainer, pl_module: LightningModule, done: _Pass) -> None:
        device, statistics = trainer.strategy.root_device, done.statistics
        limit = trainer.limit_val_batches if done.split == "val" else trainer.limit_test_batches
        limited = limit != 1.0 or isinstance(limit, int)  # 1 is one batch, 1.0 is all of them
        seen = check_each_sample_once(done.ids, done.expected, limited, device, f"the {done.split} set")
        statistics.all_reduce(device)
        if statistics.images.count < 2:
            rank_zero_warn(
                f"ReconstructionFID has {statistics.images.count} of {seen} samples to measure, a distance needs two: "
                f"raise max_samples={self.max_samples} or limit_{done.split}_batches"
            )
            return
        self.values = statistics.values(self.seed)
        rows = _first_rows([row for part in gather_objects(done.grid) for row in part], self.grid_samples)
        grid = reconstruction_grid(
            torch.stack([original for _, original, _ in rows]),
            {budget: torch.stack([shown[budget] for *_, shown in rows]) for budget in _grid_columns(done.budgets)},
        )
        tags = {m: {k: f"{done.split}/{m}/k={k:03d}" for k in done.budgets} for m in self.values[done.budgets[0]]}
        scalars = {tag: self.values[k][m] for m, by_budget in tags.items() for k, tag in by_budget.items()}
        log_evaluation(trainer, pl_module, scalars, {f"{done.split}/reconstructions": grid}, self._checkpoint)
        if done.split not in self._charted:
            charts = {metric: list(by_budget.values()) for metric, by_budget in tags.items()}
            chart_budgets(trainer, f"{done.split}: reconstruction by token budget", charts)
            self._charted.add(done.split)
        if trainer.is_global_zero:
            if done.cache is not None and seen == done.expected:
                done.cache.store_or_check(statistics.real, statistics.data_hash)
            self._report(trainer, done, seen, grid)

    def _report(self, trainer: Trainer, done: _Pass, seen: int, grid: Tensor) -> None:
        folder = self.output_dir or Path(trainer.log_dir or trainer.default_root_dir)
        folder = folder / "rfid_fit" if done.in_fit else folder
        statistics, network = done.statistics, self._network
        assert network is not None
        count, full_rank = statistics.images.count, statistics.real.statistics.full_rank
        protocol = {
            "num_samples": count,
            "split": done.split,
            "samples_in_split": done.expected,
            "samples_read": seen,
            "complete": count == done.expected,
            "data_hash": f"{statistics.data_hash % 2**64:016x}",
            "image_size": statistics.images.size,
            "extractor": network.name,
            "extractor_weights_hash": network.weights_hash,
            "extractor_resize": network.resize,
            "num_steps": self.num_steps,
            "guidance": self.guidance,
            "guidance_scale": self.guidance_scale,
            "seed": self.seed,
            "precision": str(trainer.precision),
            "device": trainer.strategy.root_device.type,
            "model_weights": done.weights,
            "step": evaluated_step(trainer, self._checkpoint),
            "versions": versions(),
        }
        extra: dict[str, dict[str, Any]] = {
            network.metric_name: {"full_rank": full_rank},
            network.kernel_metric_name: {"kernel": "cubic polynomial, originals and reconstructions paired"},
        }
        write_json(make_records(self.values, protocol, extra), folder / "rfid.json")
        title = (
            f"{count} images of {done.split}, {self.num_steps} steps, guidance {self.guidance}, weights {done.weights}"
        )
        save_png(grid, folder / "grid.png")
        if not done.in_fit:
            write_csv(self.values, count, folder / "rfid.csv")
            plot_budgets(self.values, title, folder / "rfid.png")
        notes = [f"{title}; protocol and pictures: {folder}"]
        if not full_rank:
            notes.append(
                f"{count} images are no more than {network.dim} features: the covariance is singular and "
                f"{network.metric_name} compares at equal numbers of images only; prefer {network.kernel_metric_name}."
            )
        if seen < done.expected:
            notes.append(f"limit_{done.split}_batches: only {seen} of {done.expected} samples were read.")
        print(f"\n{format_table(self.values, notes)}", flush=True)

    def _budgets(self, num_registers: int, in_fit: bool) -> list[int]:
        grid = list(range(1, num_registers + 1)) if self.budgets == "all" else self.budgets
        grid = sorted(grid or default_budgets(num_registers))
        if in_fit:
            grid = sorted(self.fit_budgets or {grid[0], grid[len(grid) // 2], grid[-1]})
        if grid[-1] > num_registers:
            name = "fit_budgets" if in_fit and self.fit_budgets else "budgets"
            raise MisconfigurationException(
                f"{name} holds {grid[-1]}, but the tokenizer has {num_registers} tokens; choose from 1 to that"
            )
        return grid


def _grid_columns(budgets: list[int]) -> list[int]:
    """The budgets that the grid picture shows."""
    if len(budgets) <= GRID_COLUMNS:
        return budgets
    return [budget for budget in default_budgets(budgets[-1]) if budget in budgets][-GRID_COLUMNS:]


def _first_rows(rows: list[GridRow], count: int) -> list[GridRow]:
    """The rows with the smallest hashes, which are the same whoever saw which sample."""
    return sorted(rows, key=lambda row: row[0])[:count]
