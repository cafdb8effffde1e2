"""What `ReconstructionFID` and `GenerationFID` share: when they run, what they check, and what they leave behind."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar, Generic, Literal

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from flextok_pl.backbones.extractors import FeatureExtractor, build_extractor, check_extractor
from flextok_pl.callbacks.charts import write_charts
from flextok_pl.callbacks.evaluation import (
    batch_images,
    bits_per_token,
    check_images,
    checkpoint_facts,
    decoding_facts,
    evaluated_step,
    extractor_facts,
    log_evaluation,
    model_hashes,
    module_reconstructor,
    split_size,
    versions,
    weights_in_use,
)
from flextok_pl.callbacks.some_validations import SomeValidations
from flextok_pl.contracts import default_budgets, run_folder
from flextok_pl.distributed import all_agree, gather_rows
from flextok_pl.evaluation.pictures import save_png
from flextok_pl.evaluation.reconstruction import check_each_sample_once
from flextok_pl.evaluation.report import format_table, make_records, plot_budgets, write_csv, write_json
from flextok_pl.evaluation.running import Pass, StatisticsT, chosen_rows
from flextok_pl.evaluation.statistics_cache import StatisticsCache
from flextok_pl.evaluation.unfinished import Unfinished
from flextok_pl.keys import choose_fraction
from flextok_pl.metrics.feature_set import POOL_SIZE, FeatureSet
from flextok_pl.precision import MEASURED_IN
from flextok_pl.progress import announced

FREE = ("values", "output_dir", "save_every_minutes")
"""Public attributes with which a killed evaluation may go on differently."""


class BudgetEvaluation(SomeValidations, Generic[StatisticsT]):
    """A pass over the evaluation data that ends with a table of metrics by token budget.

    All work is done while batches are evaluated, because Lightning's weight averaging swaps the raw weights back at the
    end of the epoch. The arguments are those of the two callbacks.
    """

    stem: ClassVar[str]
    """Name of the files."""
    picture: ClassVar[str]
    """Name of the picture's file."""
    heading: ClassVar[str]
    """Of the charts, and of the picture in TensorBoard."""
    tag: ClassVar[str] = ""
    """Between the split and the metric in a scalar's name."""

    def __init__(
        self,
        budgets: list[int] | Literal["all"] | None,
        fit_budgets: list[int] | None,
        extractor: str,
        weights: Path | str | None,
        num_steps: int,
        guidance: Literal["none", "cfg", "apg"],
        guidance_scale: float,
        every_n_validations: int,
        max_samples: int | None,
        seed: int,
        grid_samples: int,
        output_dir: Path | str | None,
        cache_dir: Path | str | None,
        save_every_minutes: float | None,
        every_n_epochs: int | None,
    ) -> None:
        super().__init__(every_n_validations, every_n_epochs)
        check_extractor(extractor, weights)
        for name, given in (("budgets", budgets), ("fit_budgets", fit_budgets)):
            if isinstance(given, list) and (not given or min(given) < 1 or len(set(given)) < len(given)):
                raise ValueError(f"{name}={given} must be different positive numbers of tokens")
        if isinstance(budgets, str) and budgets != "all":
            raise ValueError(f"budgets={budgets!r} must be a list of numbers, 'all' or null")
        for name, value, least in (
            ("num_steps", num_steps, 1),
            ("max_samples", max_samples, 1),
            ("grid_samples", grid_samples, 1),
        ):
            if value is not None and value < least:
                raise ValueError(f"{name}={value} must be at least {least}")
        if save_every_minutes is not None and not save_every_minutes >= 0:
            raise ValueError(f"save_every_minutes={save_every_minutes} must be at least 0, or null for never")
        if guidance not in ("none", "cfg", "apg"):
            raise ValueError(f"guidance={guidance!r} must be 'none', 'cfg' or 'apg'")
        if guidance == "none" and guidance_scale != 1.0:
            raise ValueError(f"guidance_scale={guidance_scale} has no effect with guidance='none'; choose cfg or apg")
        self.budgets, self.fit_budgets = budgets, fit_budgets
        self.extractor, self.weights = extractor, weights
        self.num_steps, self.guidance, self.guidance_scale = num_steps, guidance, guidance_scale
        self.max_samples, self.seed = max_samples, seed
        self.grid_samples = grid_samples
        self.output_dir = None if output_dir is None else Path(output_dir)
        self.cache_dir = None if cache_dir is None else Path(cache_dir).expanduser()
        self.save_every_minutes = save_every_minutes
        self.values: dict[int, dict[str, float]] = {}
        """Budget -> metric -> value of the latest evaluation."""
        self._network: FeatureExtractor | None = None
        self._checkpoint: dict[str, Any] | None = None
        self._pass: Pass[StatisticsT] | None = None

    @abstractmethod
    def _check_module(self, pl_module: LightningModule) -> None:
        """Refuse a module that cannot do what is measured."""

    @abstractmethod
    def _statistics(
        self,
        budgets: list[int],
        network: FeatureExtractor,
        num_made: float,
        real_pool_fraction: float,
        real: FeatureSet | None,
    ) -> StatisticsT:
        """Empty statistics of about so many made images; the networks that measure are loaded, and moved here."""

    def _num_made(self, pl_module: LightningModule, chosen: float, in_fit: bool) -> int | None:
        """How many images are to be made; None for one of each of the `chosen` real ones."""
        return None

    def _given_reference(self, network: FeatureExtractor) -> FeatureSet | None:
        """Features of real images that are not those of the data."""
        return None

    def _planned(self, trainer: Trainer, pl_module: LightningModule, running: Pass[StatisticsT]) -> list[Any]:
        """What a pass makes beside what comes with the batches."""
        return []

    @abstractmethod
    def _measure(
        self, trainer: Trainer, pl_module: LightningModule, batch: Mapping[str, Any], running: Pass[StatisticsT]
    ) -> None:
        """Measure the chosen samples of a batch, which may be none, and add to `running.grid`."""

    @abstractmethod
    def _grid(self, done: Pass[StatisticsT]) -> Tensor:
        """The picture, (3, H, W) uint8."""

    def _further_pictures(self, done: Pass[StatisticsT]) -> dict[str, Tensor]:
        """File name -> (3, H, W) uint8, outside a fit; called by all processes."""
        return {}

    @abstractmethod
    def _protocol(self) -> dict[str, Any]:
        """What made the numbers, beyond what both callbacks state."""

    @abstractmethod
    def _notes(self, done: Pass[StatisticsT]) -> tuple[str, dict[str, dict[str, Any]]]:
        """What was measured, in a few words, and metric -> what only its records say."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks that measure, so that missing weights stop a run before it starts."""
        super().setup(trainer, pl_module, stage)
        self._checkpoint = None
        if stage == "predict" or (stage == "fit" and self.every_n_validations == 0):
            return
        with announced(f"loading {self.extractor}"):
            self._network = self._network or build_extractor(self.extractor, self.weights)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Remember what says which weights are evaluated, and at which step."""
        self._checkpoint = checkpoint_facts(checkpoint)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse an unsuitable module, budgets beyond its tokens, and a validation set without images."""
        self._check_module(pl_module)
        for in_fit in (True, False):
            self._budgets(module_reconstructor(pl_module).num_registers, in_fit)
        check_images(trainer)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start a pass."""
        self._pass = self._start(trainer, pl_module, "val") if self.is_due(trainer) else None

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
        """Measure one batch."""
        running = self._pass
        if running is None:
            return
        _, keys = batch_images(batch, dataloader_idx)
        chosen = running.take_new(keys) & choose_fraction(keys, running.fraction, "subset")
        self._measure(trainer, pl_module, chosen_rows(batch, chosen), running)
        running.save_if_due()

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up all processes and report."""
        super().on_validation_epoch_end(trainer, pl_module)
        self.on_test_epoch_end(trainer, pl_module)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add up all processes and report."""
        if self._pass is not None:
            self._finish(trainer, pl_module, self._pass)
            self._pass = None

    def _start(self, trainer: Trainer, pl_module: LightningModule, split: Literal["val", "test"]) -> Pass[StatisticsT]:
        self._check_module(pl_module)
        in_fit = trainer.state.fn == TrainerFn.FITTING
        budgets = self._budgets(module_reconstructor(pl_module).num_registers, in_fit)
        expected = split_size(trainer, split)
        fraction = min(1.0, self.max_samples / expected) if in_fit and self.max_samples else 1.0
        pool_fraction = min(1.0, POOL_SIZE / (expected * fraction))
        assert self._network is not None
        network = self._network.to(pl_module.device)
        data = trainer.datamodule  # type: ignore[attr-defined]
        keeps = self.cache_dir is not None and hasattr(data, "data_hash")
        cache, real = None, self._given_reference(network)
        if keeps and real is None and not _limited(trainer, split):
            assert self.cache_dir is not None
            cache = StatisticsCache(
                self.cache_dir, data.data_hash(split), network, samples=expected, share=fraction, pool=pool_fraction
            )
            if all_agree(cache.exists(), trainer.strategy.root_device):
                real = cache.load()
        num_made = self._num_made(pl_module, expected * fraction, in_fit)
        statistics = self._statistics(budgets, network, num_made or expected * fraction, pool_fraction, real)
        facts = self._facts(trainer, pl_module, split, expected, in_fit)
        running = Pass(split, in_fit, budgets, expected, fraction, num_made, cache, statistics, facts)
        running.pending = self._planned(trainer, pl_module, running)
        if keeps and not in_fit and self.save_every_minutes is not None:
            assert self.cache_dir is not None
            options = {name: value for name, value in vars(self).items() if name[0] != "_" and name not in FREE}
            identity = {
                **facts,
                "kind": self.stem,
                "options": options,
                "data": data.data_hash(split),
                "process": [trainer.global_rank, trainer.world_size],
            }
            running.unfinished = Unfinished(self.cache_dir, identity, self.save_every_minutes)
            state = running.unfinished.load()
            if state is not None and running.can_go_on_from(state):
                running.load_state_dict(state)
                if trainer.is_global_zero:
                    print(
                        f"{type(self).__name__} goes on after {len(running.ids)} samples of an evaluation that did not "
                        f"finish ({running.unfinished.file})"
                    )
        return running

    def _facts(
        self, trainer: Trainer, pl_module: LightningModule, split: Literal["val", "test"], expected: int, in_fit: bool
    ) -> dict[str, Any]:
        network = self._network
        assert network is not None
        data = trainer.datamodule  # type: ignore[attr-defined]
        return {
            "split": split,
            "samples_in_split": expected,
            "reference": getattr(data, "sources", {}).get(split),
            "crop": getattr(data, "crop", None),
            **extractor_facts(network),
            **decoding_facts(module_reconstructor(pl_module), self.num_steps, self.guidance, self.guidance_scale),
            "seed": self.seed,
            **self._protocol(),
            "precision": MEASURED_IN,
            "device": trainer.strategy.root_device.type,
            **({} if in_fit else model_hashes(pl_module)),
            "bits_per_token": bits_per_token(module_reconstructor(pl_module)),
            "model_weights": weights_in_use(trainer, self._checkpoint),
            "step": evaluated_step(trainer, self._checkpoint),
            "versions": versions(),
        }

    def _finish(self, trainer: Trainer, pl_module: LightningModule, done: Pass[StatisticsT]) -> None:
        device, statistics = trainer.strategy.root_device, done.statistics
        ids = gather_rows(torch.tensor(done.ids, dtype=torch.int64), device)
        limited = _limited(trainer, done.split)
        seen = check_each_sample_once(ids, done.expected, limited, f"the {done.split} set")
        statistics.all_reduce(device)
        if statistics.num_images < 2:
            rank_zero_warn(
                f"{type(self).__name__} has {statistics.num_images} images to measure ({seen} samples were read), a "
                f"distance needs two: raise max_samples={self.max_samples} or limit_{done.split}_batches"
            )
            return
        if done.num_made not in (None, statistics.num_images):
            raise RuntimeError(
                f"{statistics.num_images} images were generated, {done.num_made} were to be: a process of "
                f"{trainer.world_size} had no sample of the {done.split} set, with which it starts; no number is "
                "reported: use fewer devices"
            )
        if trainer.is_global_zero and done.cache is not None and seen == done.expected:
            done.cache.store_or_check(statistics.real, statistics.data_hash)
        with announced("computing the distances"):
            self.values = statistics.values(self.seed)
        pictures = {self.picture: self._grid(done)} | ({} if done.in_fit else self._further_pictures(done))
        tags = {
            m: {k: f"{done.split}/{self.tag}{m}/k={k:03d}" for k in done.budgets} for m in self.values[done.budgets[0]]
        }
        scalars = {tag: self.values[k][m] for m, by_budget in tags.items() for k, tag in by_budget.items()}
        log_evaluation(
            trainer, pl_module, scalars, {f"{done.split}/{self.heading}": pictures[self.picture]}, self._checkpoint
        )
        history = {metric: list(by_budget.values()) for metric, by_budget in tags.items()}
        curves = {metric: {k: self.values[k][metric] for k in done.budgets} for metric in tags}
        write_charts(trainer, self.stem, f"{done.split}: {self.heading}", "token budget", history, curves)
        folder = self.output_dir or run_folder(trainer)
        if trainer.is_global_zero:
            self._report(done, seen, pictures, folder / f"{self.stem}_fit" if done.in_fit else folder)
        if done.unfinished is not None:
            done.unfinished.remove()

    def _report(self, done: Pass[StatisticsT], seen: int, pictures: Mapping[str, Tensor], folder: Path) -> None:
        statistics, network = done.statistics, self._network
        assert network is not None
        count = statistics.num_images
        full_rank = statistics.real.statistics.full_rank and count > network.dim
        protocol = {
            "num_samples": count,
            "samples_read": seen,
            "complete": done.fraction == 1 and seen == done.expected,
            "data_hash": f"{statistics.data_hash % 2**64:016x}",
            "image_size": statistics.image_size,
            **done.facts,
        }
        measured, extra = self._notes(done)
        extra = {network.metric_name: {"full_rank": full_rank}, **statistics.how, **extra}
        records = make_records(self.values, protocol, extra)
        if (bits := done.facts["bits_per_token"]) is not None:
            records = [{**record, "bits_per_image": record["num_tokens"] * bits} for record in records]
        write_json(records, folder / f"{self.stem}.json")
        steps, guidance, weights = (done.facts[name] for name in ("num_steps", "guidance", "model_weights"))
        title = f"{measured}, {steps} steps, guidance {guidance}, weights {weights}"
        for name, picture in pictures.items():
            save_png(picture, folder / name)
        if not done.in_fit:
            write_csv(self.values, count, folder / f"{self.stem}.csv")
            plot_budgets(self.values, title, folder / f"{self.stem}.png")
        notes = [f"{title}; protocol and pictures: {folder}"]
        if not full_rank:
            notes.append(
                f"{network.metric_name} of {count} images and {network.dim} features compares with other values of "
                f"{count} images only: the covariance is singular; prefer {network.kernel_metric_name}."
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
                f"{self.stem}.{name} holds {grid[-1]}, but the tokenizer has {num_registers} tokens; choose from 1 to "
                "that"
            )
        return grid


def _limited(trainer: Trainer, split: str) -> bool:
    """Whether the user has only some of the batches evaluated."""
    limit = trainer.limit_val_batches if split == "val" else trainer.limit_test_batches
    return limit != 1.0 or isinstance(limit, int)  # 1 is one batch, 1.0 is all of them
