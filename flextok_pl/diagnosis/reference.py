"""Loss curves of several runs of one experiment, to compare other runs with.

A reference is a JSON file, `references/<experiment>.json` with `_` for `/`:

    {"experiment": "tokenizer/demo",
     "made": {"date": ..., "commands": [...], "machine": ..., "commit": ...},
     "options": {"model.lr": 0.003, ...},
     "window": 20,
     "curves": {"train/loss": {"steps": [20, 40, ...], "runs": [[1.32, 1.10, ...], ...]}}}

A value is the mean of what a run logged in the last `window` steps up to its own, null if it logged nothing. Each run
has its own seed, so that their spread shows what is chance.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

from flextok_pl.diagnosis.finding import Finding, Verdict
from flextok_pl.diagnosis.training import Curve
from flextok_pl.files import write_file

FOLDER = Path(__file__).parent / "references"

WINDOW, WINDOWS = 20, 50
"""Least number of steps to average over, and about the largest number of such means in a curve."""

SPREADS, LEAST_TOLERANCE, FAR = 4.0, 0.03, 3.0
"""Tolerance in standard deviations of the seeds, its least share of their mean, and the multiple that is `wrong`."""

OF_MEDIAN = 1.25
"""Standard deviation of the median of many values, relative to that of their mean."""

OTHER_LOSSES = ("net.", "pure_noise", "timestep_shift", "label_smoothing", "reconstruction", "kl_weight", "perceptual_")
"""Beginnings of the model options that change the meaning of the loss."""

WITHOUT_EFFECT = ("seed", "vae", "tokenizer", "text_encoder", "init", "compile_blocks", "activation_checkpointing")
"""Beginnings of the model options in which runs of one experiment may differ."""

Windows = dict[int, float]
"""Last step of a window -> mean of the values in it."""


@dataclass(frozen=True)
class Reference:
    """Curves of several runs of an experiment."""

    experiment: str
    options: Mapping[str, Any]  # by dotted name, those of the model and its batches
    window: int  # steps whose values are averaged
    curves: Mapping[str, Sequence[Windows]]  # name -> one entry for each run
    made: Mapping[str, Any]  # when, how and where

    @classmethod
    def read(cls, path: Path) -> Reference:
        """Read a reference.

        Raises:
            ValueError: the file is not a reference.
        """
        try:
            held = json.loads(path.read_text(encoding="utf-8"))
            curves = {
                name: [
                    {int(step): float(v) for step, v in zip(curve["steps"], run, strict=True) if v is not None}
                    for run in curve["runs"]
                ]
                for name, curve in held["curves"].items()
            }
            made = dict(held.get("made", {}))
            return cls(str(held["experiment"]), dict(held["options"]), int(held["window"]), curves, made)
        except (OSError, UnicodeDecodeError, KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} was not written by `flextok doctor reference`: {error!r}") from error

    def write(self, path: Path) -> None:
        """Write a file that `read` reads."""
        curves = {}
        for name, runs in self.curves.items():
            steps = sorted({step for run in runs for step in run})
            rows = [[None if step not in run else float(f"{run[step]:.5g}") for step in steps] for run in runs]
            curves[name] = {"steps": steps, "runs": rows}
        held = {
            "experiment": self.experiment,
            "made": self.made,
            "options": self.options,
            "window": self.window,
            "curves": curves,
        }
        parts = [f" {json.dumps(key)}: {json.dumps(value)}" for key, value in held.items()]
        write_file(path, "{\n" + ",\n".join(parts) + "\n}\n")


def shipped(experiment: str) -> Path | None:
    """The packaged file for an experiment, if there is one."""
    file = FOLDER / f"{experiment.replace('/', '_')}.json"
    return file if file.is_file() else None


def window_of(steps: int) -> int:
    """A window for curves of `steps` steps, a multiple of the smallest one."""
    return WINDOW * max(1, -(-steps // (WINDOW * WINDOWS)))


def windows(curve: Curve, width: int) -> Windows:
    """Means of a curve's finite values over complete windows of `width` steps.

    Loggers count from 0: a value of step 49 belongs to the fiftieth.
    """
    found: dict[int, list[float]] = {}
    last = max((step for step, _ in curve), default=0)
    for step, value in curve:
        end = (step // width + 1) * width
        if math.isfinite(value) and end <= last + 1:
            found.setdefault(end, []).append(value)
    return {end: fmean(values) for end, values in sorted(found.items())}


def differing(options: Mapping[str, Any], reference: Reference) -> dict[str, tuple[Any, Any]]:
    """Options that a run and a reference state differently: name -> the reference's value and the run's."""
    names = [name for name in reference.options if name in options]
    return {n: (reference.options[n], options[n]) for n in names if reference.options[n] != options[n]}


def decides(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options that distinguish kinds of runs, by dotted name below `model`."""
    return {n: v for n, v in options.items() if not n.removeprefix("model.").startswith(WITHOUT_EFFECT)}


def against_reference(curves: Mapping[str, Curve], options: Mapping[str, Any], reference: Reference) -> Finding | str:
    """Check a run's losses against the reference at the same steps, or say why they cannot be compared.

    Only the later half of the common steps counts.
    """
    others = differing(options, reference)
    meaning = [name for name in others if name.removeprefix("model.").startswith(OTHER_LOSSES)]
    if meaning:
        return f"its loss cannot be compared with that of {reference.experiment}: {_told(others, meaning)}"
    outcomes = [
        (name, *found)
        for name, runs in reference.curves.items()
        if name in curves and (found := _deviation(windows(curves[name], reference.window), runs)) is not None
    ]
    if not outcomes:
        return f"it has no loss at the steps of the reference of {reference.experiment}"
    verdict: Verdict = "ok"
    parts, values = [], {}
    for name, excess, tolerance, until in outcomes:
        values[name] = excess
        parts.append(f"{name} {excess:+.1%} (tolerance {tolerance:.1%}) up to step {until:,}")
        if abs(excess) > FAR * tolerance:
            verdict = "wrong"
        elif abs(excess) > tolerance and verdict == "ok":
            verdict = "look"
    runs = max(map(len, reference.curves.values()))
    says = f"against {runs} runs of {reference.experiment}: {', '.join(parts)}"
    if others:
        says += f"; with {_told(others, list(others))}"
    remedy = (
        "If the loss is too high, look for the reason in options, data or code: compare config.yaml with the "
        "experiment, and see latent-scale and loss-falls. If it is too low, suspect other data or another latent scale"
    )
    return Finding("reference", verdict, says, "" if verdict == "ok" else remedy, values)


def _deviation(run: Windows, runs: Sequence[Windows]) -> tuple[float, float, int] | None:
    """The relative difference of a run from the runs' mean: the median over the later half of the common windows.

    Also returns the tolerance, from the spread of the same number over the reference's runs and of single windows, and
    the last step.
    """
    common = [step for step in run if sum(step in other for other in runs) >= 2]
    if len(common) < 2:
        return None
    later = common[len(common) // 2 :]
    of_all = {step: [other[step] for other in runs if step in other] for step in later}
    means = {step: fmean(values) for step, values in of_all.items()}

    def excess(windows: Windows) -> float:
        return median([windows[step] / means[step] - 1 for step in later if step in windows] or [0.0])

    seeds = math.sqrt(sum(excess(other) ** 2 for other in runs) / (len(runs) - 1))
    single = math.sqrt(fmean(variance(values) / means[step] ** 2 for step, values in of_all.items()))
    spread = max(seeds, OF_MEDIAN * single / math.sqrt(len(later)))
    return excess(run), max(SPREADS * spread, LEAST_TOLERANCE), later[-1]


def _told(others: Mapping[str, tuple[Any, Any]], names: Sequence[str]) -> str:
    told = [f"{name}={others[name][1]!r} for {others[name][0]!r}" for name in names[:4]]
    return ", ".join(told) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
