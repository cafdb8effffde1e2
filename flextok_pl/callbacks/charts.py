"""Charts for TensorBoard's custom-scalars tab: metrics over training by token budget, and over token budgets by run.

A run's events hold one layout of that tab only, and a curve over budgets is replaced by each evaluation where a scalar
is added to. What each callback charts therefore lies in a folder of its own in the run's folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, scalar

from flextok_pl.callbacks.trainer_facts import log_results

FOLDER = "charts"


@contextmanager
def rewritten_events(folder: Path) -> Iterator[FileWriter]:
    """Write TensorBoard events in place of those that a folder has."""
    earlier = list(folder.glob("events.out.tfevents.*"))
    with closing(FileWriter(str(folder))) as writer:
        yield writer
    for file in earlier:
        file.unlink()


def add_scalar(writer: FileWriter, tag: str, value: float, step: int) -> None:
    """Write a number, if it is finite."""
    if math.isfinite(value):
        writer.add_summary(scalar(tag, value), step)  # type: ignore[no-untyped-call]


def tagged(tags: Mapping[str, Mapping[int, str]], curves: Mapping[str, Mapping[int, float]]) -> dict[str, float]:
    """The values of the curves that have a tag, by that tag."""
    return {tag: curves[metric][k] for metric, by_budget in tags.items() for k, tag in by_budget.items()}


def log_curves(
    trainer: Trainer,
    pl_module: LightningModule,
    step: int,
    name: str,
    title: str,
    axis: str,
    tags: Mapping[str, Mapping[int, str]],
    curves: Mapping[str, Mapping[int, float]],
    pictures: Mapping[str, Tensor],
) -> None:
    """Log pictures and the tagged values of curves over budgets or positions, and chart both over training and budgets.

    The curves' steps are the budgets, and their tags the same in all runs, so that one chart overlays several runs. The
    title says what is measured (`val: reconstructions`), the axis what curves run over (`token budget`). `name` is that
    of the folder, whose events are replaced.
    """
    log_results(trainer, pl_module, step, tagged(tags, curves), pictures)
    over_training, over_axis = f"{title} by {axis}", f"{title} against {axis}"
    charted = {metric: f"{over_axis}/{metric}" for metric in curves}
    layout = {  # TensorBoard shows whatever a pattern is found in
        over_axis: {m: ["Multiline", [f"^{re.escape(tag)}$"]] for m, tag in charted.items()},
        over_training: {m: ["Multiline", [f"^{re.escape(t)}$" for t in each.values()]] for m, each in tags.items()},
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            with rewritten_events(Path(logger.log_dir) / FOLDER / name) as writer:
                writer.add_summary(custom_scalars(layout))  # type: ignore[no-untyped-call]
                for metric, tag in charted.items():
                    for k, value in curves[metric].items():
                        add_scalar(writer, tag, value, k)
