"""Reads the logs of a run: scalars of TensorBoard's events, of CSV files and of `metrics.jsonl` in its folder."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

Point = tuple[str, int, float]
"""Name, step, value."""


def read_curves(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Read all curves in a run's folder: name -> (step, value), by step.

    A resumed run has measured some steps twice; the later value counts.
    """
    found: dict[str, dict[int, float]] = {}
    for name, step, value in [*_of_lines(folder), *_of_tables(folder), *_of_events(folder)]:
        found.setdefault(name, {})[step] = value
    return {name: sorted(values.items()) for name, values in found.items()}


def _of_events(folder: Path) -> Iterator[Point]:
    if any(folder.glob("events.out.tfevents.*")):
        events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "histograms": 1}).Reload()
        for name in events.Tags()["scalars"]:
            for event in events.Scalars(name):
                yield name, int(event.step), float(event.value)


def _of_tables(folder: Path) -> Iterator[Point]:
    """Points of Lightning's CSV logger; the files of earlier parts are numbered."""
    numbered = sorted(folder.glob("metrics_*.csv"), key=lambda file: (len(file.name), file.name))
    for file in [*numbered, folder / "metrics.csv"]:
        if not file.is_file():
            continue
        with file.open(newline="", encoding="utf-8") as lines:
            for row in csv.DictReader(lines):
                step = row.get("step")
                for name, text in row.items():
                    if step and text and name not in ("step", "epoch"):
                        yield name, int(float(step)), float(text)


def _of_lines(folder: Path) -> Iterator[Point]:
    """Points of the callback `MetricsLog`; a killed process may have left half a line."""
    file = folder / "metrics.jsonl"
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        try:
            entry = json.loads(line)
        except json.JSONDecodeError:
            continue
        if entry.get("stage") == "fit":
            for name, value in entry["metrics"].items():
                yield name, int(entry["step"]), float(value)
