"""Write results to the terminal and to disk. A record is one number with its protocol."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from flextok_pl.evaluation.pictures import save_figure, save_png
from flextok_pl.files import write_file
from flextok_pl.records import Record as Record  # re-exported
from flextok_pl.records import read_records as read_records


@dataclass(frozen=True)
class Results:
    """The results of an evaluation."""

    values: dict[int, dict[str, float]]  # budget -> metric -> value
    protocol: dict[str, Any]  # facts that all records state
    by_metric: dict[str, dict[str, Any]]  # metric -> facts that only its records state
    pictures: dict[str, Tensor]  # file name -> (3, H, W) uint8
    title: str  # what was measured, and how, in a few words
    notes: list[str]  # remarks for readers of the numbers

    @property
    def metrics(self) -> list[str]:
        """Names of the metrics, in the order of the records."""
        return list(next(iter(self.values.values())))

    @property
    def records(self) -> list[Record]:
        """One record per budget and metric."""
        records, bits = make_records(self.values, self.protocol, self.by_metric), self.protocol["bits_per_token"]
        return [r if bits is None else {**r, "bits_per_image": r["num_tokens"] * bits} for r in records]

    def table(self, folder: Path) -> str:
        """The values as text, and the folder of the rest."""
        rows = [[str(k), *(format_value(found[m]) for m in self.metrics)] for k, found in self.values.items()]
        table = format_columns([["tokens", *self.metrics], *rows])
        return "\n".join([table, f"{self.title}; protocol and pictures: {folder}", *self.notes])

    def write(self, folder: Path, name: str, whole: bool = True) -> None:
        """Write the records and the pictures; for a whole evaluation also a table and charts."""
        write_json(self.records, folder / f"{name}.json")
        for file, picture in self.pictures.items():
            save_png(picture, folder / file)
        if whole:
            count = self.protocol["num_samples"]
            rows = [[k, count, *(found[m] for m in self.metrics)] for k, found in self.values.items()]
            lines = [",".join(map(str, row)) for row in [["num_tokens", "num_samples", *self.metrics], *rows]]
            write_file(folder / f"{name}.csv", "\n".join([*lines, ""]))
            plot_budgets(self.values, self.title, folder / f"{name}.png")


def make_records(
    values: Mapping[int, Mapping[str, float]], protocol: Mapping[str, Any], extra: Mapping[str, Mapping[str, Any]]
) -> list[Record]:
    """One record per budget and metric, with the protocol and the facts in `extra` of its metric."""
    return [
        {"metric": metric, "value": value, "num_tokens": budget, **protocol, **extra.get(metric, {})}
        for budget, metrics in values.items()
        for metric, value in metrics.items()
    ]


def format_columns(rows: Sequence[Sequence[str]]) -> str:
    """Align columns to the right, with a rule under the first line."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
    lines.insert(1, "  ".join("-" * width for width in widths))
    return "\n".join(lines)


def protocol_differences(first: Record, second: Record) -> dict[str, tuple[Any, Any]]:
    """Entries, except the value, in which two records of a metric differ, by dotted name; None for a missing one."""
    one, two = _flat(first), _flat(second)
    names = [name for name in dict.fromkeys([*one, *two]) if name != "value"]
    return {name: (one.get(name), two.get(name)) for name in names if one.get(name) != two.get(name)}


def _flat(record: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in record.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def write_json(records: Sequence[Record], path: Path) -> None:
    """Write a list of records; a value that is not a finite number raises ValueError."""
    write_file(path, json.dumps(list(records), indent=1, allow_nan=False).encode() + b"\n")


def draw_budgets(values: Mapping[int, Mapping[str, float]], axis: str = "tokens") -> tuple[Figure, dict[str, Axes]]:
    """Draw each metric against the token budget on a log-2 axis, one panel each; returns the panels by metric."""
    metrics = list(next(iter(values.values())))
    budgets = list(values)
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.2 * columns, 2.6 * rows + 0.4), dpi=120, layout="constrained")
    panels = {metric: figure.add_subplot(rows, columns, index + 1) for index, metric in enumerate(metrics)}
    for metric, axes in panels.items():
        axes.plot(budgets, [values[budget][metric] for budget in budgets], marker="o", markersize=4)
        axes.set_xscale("log", base=2)
        if len(budgets) <= 10:
            axes.set_xticks(budgets, [str(budget) for budget in budgets])
            axes.minorticks_off()
        axes.set_title(metric, fontsize=9)
        axes.set_xlabel(axis, fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    return figure, panels


def plot_budgets(values: Mapping[int, Mapping[str, float]], title: str, path: Path) -> None:
    """Write the figure of `draw_budgets` as PNG."""
    figure, _ = draw_budgets(values)
    figure.suptitle(title, fontsize=10)
    save_figure(figure, path)


def format_value(value: float) -> str:
    """Four digits."""
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1e3 else f"{value:.4g}"
