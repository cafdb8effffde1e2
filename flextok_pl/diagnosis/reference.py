"""Loss curves of runs of one experiment, with which other runs of it are compared.

A reference is a JSON file, `references/<experiment>.json` with `_` for `/`:

    {"experiment": "tokenizer/demo",
     "made": {"date": ..., "commands": [...], "machine": ..., "commit": ...},
     "options": {"model.lr": 0.003, ...},
     "window": 20,
     "curves": {"train/loss": {"steps": [20, 40, ...], "runs": [[1.32, 1.10, ...], ...]}}}

A value is the mean of what a run logged in the last `window` steps up to its own, null where it logged nothing.
Each run has a seed of its own, so that their spread tells what is chance.
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
"""Steps whose values are averaged at least, and about how many such means a curve has at most."""

SPREADS, LEAST_TOLERANCE, FAR = 4.0, 0.03, 3.0
"""A run may be so many deviations of the seeds from their mean, or this share of it; so many times that is `wrong`."""

OF_MEDIAN = 1.25
"""Deviation of a median of many values over that of their mean."""

OTHER_LOSSES = ("net.", "pure_noise", "timestep_shift", "label_smoothing", "reconstruction", "kl_weight", "perceptual_")
"""Beginnings of the options of a model that decide what its loss means."""

WITHOUT_EFFECT = ("seed", "vae", "tokenizer", "text_encoder", "init", "compile_blocks", "activation_checkpointing")
"""Beginnings of the options of a model that do not tell one run of an experiment from another."""

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
        """Read a file.

        Raises:
            ValueError: it is no reference.
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
            raise ValueError(f"{path} is no file that `flextok doctor reference` has written: {error!r}") from error

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
    """The file of this package for an experiment, if there is one."""
    file = FOLDER / f"{experiment.replace('/', '_')}.json"
    return file if file.is_file() else None


def window_of(steps: int) -> int:
    """A window for curves of so many steps, a multiple of the least one."""
    return WINDOW * max(1, -(-steps // (WINDOW * WINDOWS)))


def windows(curve: Curve, width: int) -> Windows:
    """Means of a curve's finite values over windows of `width` steps, of those that are over.

    Loggers count from 0: a value of step 49 is of the fiftieth.
    """
    found: dict[int, list[float]] = {}
    last = max((step for step, _ in curve), default=0)
    for step, value in curve:
        end = (step // width + 1) * width
        if math.isfinite(value) and end <= last + 1:
            found.setdefault(end, []).append(value)
    return {end: fmean(values) for end, values in sorted(found.items())}


def differing(options: Mapping[str, Any], reference: Reference) -> dict[str, tuple[Any, Any]]:
    """Options that a run and a reference both state, and state differently: name -> the reference's and the run's."""
    names = [name for name in reference.options if name in options]
    return {n: (reference.options[n], options[n]) for n in names if reference.options[n] != options[n]}


def decides(options: Mapping[str, Any]) -> dict[str, Any]:
    """Those options, by dotted name below `model`, that tell one kind of run from another."""
    return {n: v for n, v in options.items() if not n.removeprefix("model.").startswith(WITHOUT_EFFECT)}


def against_reference(curves: Mapping[str, Curve], options: Mapping[str, Any], reference: Reference) -> Finding | str:
    """Whether a run's losses are as in the reference at the same steps, or why they cannot be compared.

    What counts is the later half of the steps that both have.
    """
    others = differing(options, reference)
    meaning = [name for name in others if name.removeprefix("model.").startswith(OTHER_LOSSES)]
    if meaning:
        return f"its loss means something else than that of {reference.experiment}: {_told(others, meaning)}"
    outcomes = [
        (name, *found)
        for name, runs in reference.curves.items()
        if name in curves and (found := _deviation(windows(curves[name], reference.window), runs)) is not None
    ]
    if not outcomes:
        return f"it has no loss at the steps that the reference of {reference.experiment} has"
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
        "A loss that is too high has a reason in options, data or code: compare config.yaml with the experiment, and "
        "see latent-scale and loss-falls. One that is too low mostly means other data or latents of another scale"
    )
    return Finding("reference", verdict, says, "" if verdict == "ok" else remedy, values)


def _deviation(run: Windows, runs: Sequence[Windows]) -> tuple[float, float, int] | None:
    """Median over the later half of the common windows of how far a run is from the runs' mean, as a share of that.

    With the tolerance, from the spread of the same number over the reference's runs and of single windows, and the
    last step.
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
