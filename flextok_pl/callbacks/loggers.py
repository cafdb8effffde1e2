"""Sends results to the loggers of a trainer. No other callback knows the kinds of loggers.

Lightning's loggers share one method, for numbers. This is what else each takes, and in which form:

| logger | pictures | histograms | charts |
|---|---|---|---|
| TensorBoard | images tab | histograms tab | custom-scalars tab |
| Weights & Biases | images | histograms | line plots, one for each metric |
| MLflow | images by step | drawn | drawn |
| CSV | PNG files in `pictures` of the run's folder | drawn | drawn |
| others with `log_image(key, images, step)`, as that of W&B | yes | drawn | drawn |

Drawn results are logged as pictures. All other loggers get only the numbers.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.trainer.states import TrainerFn
from matplotlib.figure import Figure
from torch import Tensor

from flextok_pl.callbacks.charts import Chart, write_chart
from flextok_pl.evaluation.pictures import figure_to_image, save_png

BINS = 64
"""Number of bins of a histogram, if the logger does not choose it."""

PICTURES = "pictures"
"""Folder of a run's pictures, if its logger writes files."""


def log_results(
    trainer: Trainer,
    pl_module: LightningModule,
    step: int,
    scalars: Mapping[str, float],
    pictures: Mapping[str, Tensor],
    histograms: Mapping[str, Tensor] | None = None,
    chart: Chart | None = None,
) -> None:
    """Send results by tag to the loggers, and to the trainer's `callback_metrics`, for checkpoints and `MetricsLog`.

    Scalars are equal on all ranks, pictures (3, H, W) uint8, and histograms of values of any shape.
    """
    if trainer.state.fn == TrainerFn.FITTING:
        pl_module.log_dict(dict(scalars), sync_dist=True)
    else:  # Lightning would print each of them in a table of its own
        log_numbers(trainer, step, scalars)
        trainer.callback_metrics.update({tag: torch.tensor(value) for tag, value in scalars.items()})
    if not trainer.is_global_zero:
        return
    for logger in trainer.loggers:
        show = _show_for(logger, step)
        if show is not None:
            for tag, picture in pictures.items():
                show.picture(tag, picture)
            for tag, values in (histograms or {}).items():
                show.histogram(tag, values)
            if chart is not None:
                show.chart(chart)


def log_numbers(trainer: Trainer, step: int, values: Mapping[str, float]) -> None:
    """Send numbers by tag to the loggers at once, whatever `log_every_n_steps` is. The trainer does not see them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(values), step=step)


def tensorboard_folders(trainer: Trainer) -> list[Path]:
    """The run's folders of TensorBoard events, for what only TensorBoard shows."""
    return [Path(logger.log_dir) for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


class _Show(ABC):
    """Sends pictures, histograms and charts of one step to a logger."""

    def __init__(self, logger: Any, step: int) -> None:
        self.logger, self.step = logger, step

    @abstractmethod
    def picture(self, tag: str, picture: Tensor) -> None:
        """Log a picture, (3, H, W) uint8."""

    def histogram(self, tag: str, values: Tensor) -> None:
        """Log a histogram of values of any shape, as a drawing unless a subclass does better."""
        self.picture(tag, draw_histogram(values))

    def chart(self, chart: Chart) -> None:
        """Drawn."""
        self.picture(chart.heading, chart.drawn())


class _ByLogImage(_Show):
    def picture(self, tag: str, picture: Tensor) -> None:
        self.logger.log_image(tag, [_rows(picture)], self.step)


class _Wandb(_ByLogImage):
    def histogram(self, tag: str, values: Tensor) -> None:
        import wandb

        counts = np.histogram(values.flatten().cpu().numpy(), bins=BINS)
        self.logger.log_metrics({tag: wandb.Histogram(np_histogram=counts)}, self.step)

    def chart(self, chart: Chart) -> None:
        import wandb

        plots = {
            f"{chart.heading}/{metric}": wandb.plot.line_series(
                xs=list(curve), ys=[list(curve.values())], keys=[metric], title=metric, xname=chart.axis
            )
            for metric, curve in chart.curves.items()
        }
        self.logger.log_metrics(plots, self.step)


class _TensorBoard(_Show):
    def picture(self, tag: str, picture: Tensor) -> None:
        self.logger.experiment.add_image(tag, picture, self.step)

    def histogram(self, tag: str, values: Tensor) -> None:
        self.logger.experiment.add_histogram(tag, values, self.step)

    def chart(self, chart: Chart) -> None:
        write_chart(Path(self.logger.log_dir), chart)


class _MLflow(_Show):
    def picture(self, tag: str, picture: Tensor) -> None:
        run = self.logger.run_id
        self.logger.experiment.log_image(run, _rows(picture), key=_plain(tag), step=self.step)


class _Files(_Show):
    def picture(self, tag: str, picture: Tensor) -> None:
        file = Path(self.logger.log_dir) / PICTURES / _plain(tag) / f"step{self.step:07d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        save_png(picture, file)


SHOWS: dict[type[Any], type[_Show]] = {
    TensorBoardLogger: _TensorBoard,
    WandbLogger: _Wandb,
    MLFlowLogger: _MLflow,
    CSVLogger: _Files,
}


def _show_for(logger: object, step: int) -> _Show | None:
    kind = next((show for kind, show in SHOWS.items() if isinstance(logger, kind)), None)
    if kind is None and hasattr(logger, "log_image"):
        kind = _ByLogImage
    return None if kind is None else kind(logger, step)


def draw_histogram(values: Tensor) -> Tensor:
    """Draw a histogram of values of any shape, as (3, H, W) uint8."""
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.hist(values.flatten().cpu().numpy(), bins=BINS)
    axes.set_xlabel("value")
    axes.set_ylabel("count")
    return figure_to_image(figure)


def _rows(picture: Tensor) -> np.ndarray[Any, Any]:
    """(3, H, W) -> (H, W, 3)."""
    return picture.permute(1, 2, 0).cpu().numpy()


def _plain(tag: str) -> str:
    """A tag with only the characters that MLflow takes, as Lightning's logger writes the names of numbers."""
    return re.sub(r"[^a-zA-Z0-9_/. -]+", "", tag)
