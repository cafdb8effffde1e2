"""Evaluates token budgets during a fit and in a test: passes batches to `evaluation`, and logs its results."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from flextok_pl.callbacks.charts import Chart
from flextok_pl.callbacks.evaluation import EvaluationCallback, Split
from flextok_pl.callbacks.loggers import log_results
from flextok_pl.callbacks.trainer_facts import (
    generator_of,
    is_limited,
    model_facts,
    require_image_shards,
    source_of,
    split_size,
    tokenizer_of,
)
from flextok_pl.contracts import run_folder
from flextok_pl.evaluation.budget_evaluation import BudgetEvaluation, Context
from flextok_pl.evaluation.generation import GenerationEvaluation
from flextok_pl.evaluation.options import EvaluationOptions, GenerationOptions, ReconstructionOptions
from flextok_pl.evaluation.reconstruction import ReconstructionEvaluation
from flextok_pl.evaluation.report import Results
from flextok_pl.progress import announced
from flextok_pl.runtime import stop_if_preempted


class BudgetEvaluationCallback(EvaluationOptions, EvaluationCallback):
    """Passes batches to an evaluation, and logs its results. The options are the callback's own fields."""

    results: Results | None = None  # of the latest evaluation
    kind: ClassVar[type[BudgetEvaluation]]
    model_of: ClassVar[Callable[[LightningModule], Any]]  # the part of a module that it evaluates
    _evaluation: BudgetEvaluation | None = None

    @property
    def values(self) -> dict[int, dict[str, float]]:
        """Budget -> metric -> value of the latest evaluation."""
        return {} if self.results is None else self.results.values

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Load the networks of the metrics, so that missing weights stop a run before it starts."""
        super().setup(trainer, pl_module, stage)
        if self._evaluation is None and stage != "predict" and (stage != "fit" or self.every_n_validations):
            with announced(f"loading {self.extractor}"):
                self._evaluation = self.kind(self, trainer.strategy.root_device)

    def check(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start an evaluation, only to refuse early what does not fit."""
        self.begin(trainer, pl_module, "val")
        require_image_shards(trainer)

    def begin(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Start an evaluation."""
        model = type(self).model_of(pl_module)
        data, in_fit = trainer.datamodule, trainer.state.fn == TrainerFn.FITTING  # type: ignore[attr-defined]
        context = Context(
            num_samples=split_size(trainer, split),
            split=split,
            limited=is_limited(trainer, split),
            image_size=getattr(data, "image_size", None),
            data_hash=data.data_hash(split) if hasattr(data, "data_hash") else None,
            facts={
                "reference": source_of(trainer, split),
                "crop": getattr(data, "crop", None),
                **({} if in_fit else model_facts(pl_module)),
                "model_weights": self.weights_of(trainer),
                "step": self.step_of(trainer),
            },
            in_fit=in_fit,
            num_batches=sum(trainer.num_val_batches if split == "val" else trainer.num_test_batches),
            pause=partial(stop_if_preempted, trainer),
        )
        self._running.start(model, context)

    def measure(self, pl_module: LightningModule, batch: Mapping[str, Any], batch_idx: int) -> None:
        """Pass on a batch."""
        self._running.update(batch)

    def report(self, trainer: Trainer, pl_module: LightningModule, split: Split) -> None:
        """Log the results, and write files."""
        evaluation = self._running
        results = evaluation.finish()
        if results is None:
            return
        self.results = results
        heading, values = evaluation.heading, results.values
        curves = {metric: {k: found[metric] for k, found in values.items()} for metric in results.metrics}
        tags = {metric: {k: f"{split}/{evaluation.tag}{metric}/k={k:03d}" for k in values} for metric in curves}
        grid = {f"{split}/{heading}": results.pictures[evaluation.picture]}
        chart = Chart(self.name, f"{split}: {heading}", "token budget", tags, curves)
        log_results(trainer, pl_module, self.step_of(trainer), chart.scalars, grid, chart=chart)
        in_fit = evaluation.context.in_fit
        folder = run_folder(trainer) if self.output_dir is None else Path(self.output_dir).expanduser()
        folder = folder / f"{self.name}_fit" if in_fit else folder
        if trainer.is_global_zero:
            results.write(folder, self.name, whole=not in_fit)
            print(f"\n{results.table(folder)}", flush=True)
        evaluation.forget()

    @property
    def _running(self) -> BudgetEvaluation:
        assert self._evaluation is not None
        return self._evaluation


class ReconstructionFID(ReconstructionOptions, BudgetEvaluationCallback):
    """Measure reconstructions at several token budgets: feature distances, and errors of pixels and perception.

    Errors are MAE, MSE, PSNR and SSIM, and on request LPIPS and DreamSim.

    Works on any module with a `reconstructor` that can tokenize and detokenize. The arguments are the fields of
    `ReconstructionOptions`.

    `trainer.validate` and `trainer.test` measure the full grid on all samples. They write `rfid.json` (one record per
    number, with its protocol), `rfid.csv`, `rfid.png`, `grid.png`, and `extremes.png` with the images of smallest and
    largest squared error at each budget. Validations of a fit measure a cheap subset, for the logger,
    `rfid_fit/rfid.json` and `rfid_fit/grid.png`.
    """

    kind = ReconstructionEvaluation
    model_of = tokenizer_of


class GenerationFID(GenerationOptions, BudgetEvaluationCallback):
    """Measure generated images at several token budgets: distances to real ones, scores, agreement with the condition.

    Works on any module with a prior that generates tokens and a tokenizer that decodes them. The arguments are the
    fields of `GenerationOptions`.

    `trainer.validate` and `trainer.test` measure the full grid. They write `gfid.json` (one record per number, with its
    protocol), `gfid.csv`, `gfid.png` and `gfid_grid.png`, which shows fixed conditions and seeds, one row each, with
    one column per budget. Validations of a fit measure less, for the logger and `gfid_fit/`.
    """

    kind = GenerationEvaluation
    model_of = generator_of
