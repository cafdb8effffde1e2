"""Charts of metrics over token budgets or positions, for TensorBoard and as pictures.

A run's events can hold only one layout of TensorBoard's custom-scalars tab. Each evaluation replaces a curve over
budgets, while it adds to a scalar. So each callback writes its charts to a folder of their own in the run's folder.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor
from torch.utils.tensorboard import FileWriter
from torch.utils.tensorboard.summary import custom_scalars, scalar

from flextok_pl.evaluation.pictures import figure_to_image
from flextok_pl.evaluation.report import draw_budgets

FOLDER = "charts"


@dataclass(frozen=True)
class Chart:
    """Curves over token budgets or positions.

    Attributes:
        name: folder of its events, which the next chart of this name replaces.
        title: what is measured, such as `val: reconstructions`.
        axis: what the curves run over, such as `token budget`.
        tags: metric -> budget or position -> tag of the number that is logged for it. Tags are the same in all runs,
            and the budgets are the steps of the curves, so that one chart overlays several runs.
        curves: metric -> budget or position -> value.
    """

    name: str
    title: str
    axis: str
    tags: Mapping[str, Mapping[int, str]]
    curves: Mapping[str, Mapping[int, float]]

    @property
    def heading(self) -> str:
        """Title of the curves over the axis."""
        return f"{self.title} against {self.axis}"

    @property
    def scalars(self) -> dict[str, float]:
        """The values that have a tag, by that tag."""
        return {tag: self.curves[metric][k] for metric, by_k in self.tags.items() for k, tag in by_k.items()}

    def drawn(self) -> Tensor:
        """Draw the curves as a picture, (3, H, W) uint8."""
        budgets = next(iter(self.curves.values()))
        values = {k: {metric: curve[k] for metric, curve in self.curves.items()} for k in budgets}
        figure, _ = draw_budgets(values, self.axis)
        figure.suptitle(self.title, fontsize=10)
        return figure_to_image(figure)


def write_chart(run: Path, chart: Chart) -> None:
    """Show the curves, and their tagged values over the training, in TensorBoard's custom-scalars tab.

    `run` is the folder of the run's events.
    """
    over_training, over_axis = f"{chart.title} by {chart.axis}", chart.heading
    charted = {metric: f"{over_axis}/{metric}" for metric in chart.curves}
    layout = {  # TensorBoard shows every tag in which it finds a pattern
        over_axis: {m: ["Multiline", [f"^{re.escape(tag)}$"]] for m, tag in charted.items()},
        over_training: {
            m: ["Multiline", [f"^{re.escape(tag)}$" for tag in each.values()]] for m, each in chart.tags.items()
        },
    }
    with rewritten_events(run / FOLDER / chart.name) as writer:
        writer.add_summary(custom_scalars(layout))  # type: ignore[no-untyped-call]
        for metric, tag in charted.items():
            for k, value in chart.curves[metric].items():
                add_scalar(writer, tag, value, k)


@contextmanager
def rewritten_events(folder: Path) -> Iterator[FileWriter]:
    """Write TensorBoard events in place of those in a folder."""
    earlier = list(folder.glob("events.out.tfevents.*"))
    with closing(FileWriter(str(folder))) as writer:
        yield writer
    for file in earlier:
        file.unlink()


def add_scalar(writer: FileWriter, tag: str, value: float, step: int) -> None:
    """Write a number, if it is finite."""
    if math.isfinite(value):
        writer.add_summary(scalar(tag, value), step)  # type: ignore[no-untyped-call]
