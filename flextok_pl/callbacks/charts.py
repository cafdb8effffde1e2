"""Charts for TensorBoard's custom-scalars tab: metrics over training by token budget, and over token budgets by run.

A run's events hold one layout of that tab only, and a curve over budgets is replaced by each evaluation where a scalar
is added to. What each callback charts therefore lies in a folder of its own in the run's folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, scalar

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


def write_charts(
    trainer: Trainer,
    name: str,
    title: str,
    axis: str,
    history: Mapping[str, Sequence[str]],
    curves: Mapping[str, Mapping[int, float]],
) -> None:
    """Show TensorBoard scalars on charts over training steps, and metrics as curves over budgets or positions.

    The curves' steps are the budgets, and their tags the same in all runs, so that one chart overlays several runs. The
    title says what is measured (`val: reconstructions`), the axis what curves run over (`token budget`). `name` is that
    of the folder, whose events are replaced; `history` maps charts to tags of the run's scalars, `curves` charts to
    values by budget.
    """
    over_training, over_axis = f"{title} by {axis}", f"{title} against {axis}"
    tags = {metric: f"{over_axis}/{metric}" for metric in curves}
    layout = {  # TensorBoard shows whatever a pattern is found in
        over_axis: {metric: ["Multiline", [f"^{re.escape(tag)}$"]] for metric, tag in tags.items()},
        over_training: {m: ["Multiline", [f"^{re.escape(tag)}$" for tag in each]] for m, each in history.items()},
    }
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger) and trainer.is_global_zero:
            with rewritten_events(Path(logger.log_dir) / FOLDER / name) as writer:
                writer.add_summary(custom_scalars(layout))  # type: ignore[no-untyped-call]
                for metric, tag in tags.items():
                    for step, value in curves[metric].items():
                        add_scalar(writer, tag, value, step)
