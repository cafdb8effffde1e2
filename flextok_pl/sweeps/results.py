"""Shows what a sweep has found: a table on the terminal, a CSV file, and pictures."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime, timedelta
from typing import Any

import numpy as np
import optuna
from matplotlib import pyplot
from matplotlib.figure import Figure
from optuna.trial import FrozenTrial, TrialState
from optuna.visualization import matplotlib as drawings
from rich.table import Table

from flextok_pl.evaluation.pictures import save_figure
from flextok_pl.files import write_file
from flextok_pl.sweeps.runner import TrialFolder
from flextok_pl.sweeps.scaling import draw_scaling, fit_power_law
from flextok_pl.sweeps.sweep import Sweep

PICTURES: dict[str, Callable[..., Any]] = {
    "best_so_far": drawings.plot_optimization_history,
    "parallel_coordinates": drawings.plot_parallel_coordinate,
    "importance": drawings.plot_param_importances,
    "slices": drawings.plot_slice,
}


def status_table(sweep: Sweep, study: optuna.Study) -> Table:
    """A table of all trials: state, value, progress, parameters, and the reasons of failures."""
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    best = study.best_trial.number if complete else None
    table = Table(title=f"{sweep.name}: {sweep.direction} {sweep.metric}, {sweep.num_trials} trials")
    for column in ("trial", "state", sweep.metric, "step", "took", "parameters", ""):
        table.add_column(column, justify="left" if column in ("state", "parameters", "") else "right")
    for trial, folder in _started(sweep, study):
        state = folder.read("state")
        measured = [entry for seed in sweep.seeds for entry in folder.measured(f"version_{seed}")]
        seen = [entry for entry in measured if entry["stage"] == "fit"]
        value = trial.value if trial.value is not None else (seen[-1]["metrics"].get(sweep.metric) if seen else None)
        queued = trial.state == TrialState.RUNNING and state is None and not folder.log.exists()
        table.add_row(
            str(trial.number),
            "queued" if queued else trial.state.name.lower(),
            "" if value is None else f"{value:.6g}",
            str(seen[-1]["step"]) if seen else "",
            _duration(trial),
            sweep.title(trial.params).replace(",", ", "),
            trial.user_attrs.get("reason") or "; ".join((state or {"failures": []})["failures"][-1:]),
            style="bold green" if trial.number == best else None,
        )
    return table


def _started(sweep: Sweep, study: optuna.Study) -> Iterator[tuple[FrozenTrial, TrialFolder]]:
    for trial in study.get_trials(deepcopy=False):
        if trial.state != TrialState.WAITING:
            yield trial, sweep.trial_folder(trial.number, trial.params)


def _duration(trial: FrozenTrial) -> str:
    """Hours, minutes and seconds of a trial; so far, if it runs."""
    if trial.datetime_start is None:
        return ""
    taken = (trial.datetime_complete or datetime.now()) - trial.datetime_start
    return str(timedelta(seconds=int(taken.total_seconds())))


def rows(sweep: Sweep, study: optuna.Study) -> Iterator[dict[str, Any]]:
    """One row for each trial and seed: parameters, all last metrics, and where the run is."""
    for trial, folder in _started(sweep, study):
        for seed in sweep.seeds:
            yield {
                "trial": trial.number,
                "seed": seed,
                "state": trial.state.name.lower(),
                **sweep.points.exact(trial.params),
                **trial.user_attrs.get(f"version_{seed}", {}),
                "seconds": (folder.read("state") or {}).get("seconds"),
                "run": str(folder.path / f"version_{seed}"),
                "reason": trial.user_attrs.get("reason"),
            }


def write_results(sweep: Sweep, study: optuna.Study) -> None:
    """Write `results.csv`, and the pictures for which there are enough trials."""
    found = list(rows(sweep, study))
    columns = list(dict.fromkeys(column for row in found for column in row))
    content = io.StringIO()
    writer = csv.DictWriter(content, columns)
    writer.writeheader()
    writer.writerows(found)
    write_file(sweep.root / "results.csv", content.getvalue())
    complete = study.get_trials(deepcopy=False, states=[TrialState.COMPLETE])
    write_file(sweep.root / "results.md", markdown_table(sweep, complete))
    if complete and sweep.curves:
        save_figure(draw_curves(sweep, complete), sweep.root / "curves.png")
    if complete and sweep.scaling is not None:
        save_figure(scaling_picture(sweep, complete, sweep.scaling), sweep.root / "scaling.png")
    if len({tuple(trial.params.items()) for trial in complete}) < 2:
        return
    for name, draw in PICTURES.items():
        style = pyplot.rc_context({"figure.figsize": (9, 5), "savefig.dpi": 110, "savefig.bbox": "tight"})
        with warnings.catch_warnings(), style:
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            try:
                draw(study, target_name=sweep.metric)
            except (ValueError, RuntimeError) as error:  # all values alike, or no parameter that all trials have
                print(f"{name}.png is not drawn: {error}")
            else:
                save_figure(pyplot.gcf(), sweep.root / f"{name}.png")
            pyplot.close("all")


def over_seeds(sweep: Sweep, trial: FrozenTrial, metric: str) -> tuple[float, float]:
    """Mean and standard deviation over the seeds of a trial's last value; NaN if it was not logged."""
    values = [trial.user_attrs[f"version_{seed}"].get(metric, math.nan) for seed in sweep.seeds]
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else 0.0


def budgets(trial: FrozenTrial, curve: str) -> dict[int, str]:
    """Token budget -> metric of a curve."""
    names = {name for metrics in trial.user_attrs.values() if isinstance(metrics, dict) for name in metrics}
    found = {int(name.removeprefix(f"{curve}/k=")): name for name in names if name.startswith(f"{curve}/k=")}
    return dict(sorted(found.items()))


def markdown_table(sweep: Sweep, trials: Sequence[FrozenTrial]) -> str:
    """The finished trials with the metric and the curves' values, as mean ± standard deviation over the seeds."""
    metrics = {sweep.metric: None}  # ordered
    for curve in sweep.curves:
        metrics |= dict.fromkeys(name for trial in trials for name in budgets(trial, curve).values())
    lines = ["| " + " | ".join(["trial", *metrics]) + " |", "|---|" + "---:|" * len(metrics)]
    for trial in trials:
        cells = []
        for metric in metrics:
            mean, deviation = over_seeds(sweep, trial, metric)
            spread = f" ± {deviation:.2g}" if len(sweep.seeds) > 1 else ""
            cells.append("" if math.isnan(mean) else f"{mean:.4g}{spread}")
        lines.append("| " + " | ".join([sweep.title(trial.params), *cells]) + " |")
    return "\n".join(lines) + "\n"


def scaling_picture(sweep: Sweep, trials: Sequence[FrozenTrial], parameter: str) -> Figure:
    """Metric against operations, a line for each value of a parameter, with a power law if one can be fitted."""
    groups: dict[str, list[tuple[float, float]]] = {}
    for trial in trials:
        point = (over_seeds(sweep, trial, "train/flops")[0], over_seeds(sweep, trial, sweep.metric)[0])
        groups.setdefault(str(sweep.points.exact(trial.params)[parameter]), []).append(point)
    series = {name: (np.array(points)[:, 0], np.array(points)[:, 1]) for name, points in groups.items()}
    flops, values = (np.concatenate([points[i] for points in series.values()]) for i in range(2))
    law = None
    try:
        law = fit_power_law(flops, values)
    except ValueError as error:
        print(f"no power law is fitted: {error}")
    else:
        spread = 100 * np.sqrt((law.residuals**2).mean())
        print(
            f"{sweep.metric} = {law.floor:.4g} + {law.scale:.4g} (C / {law.unit:.4g})^-{law.exponent:.3f}, with C "
            f"operations of a training; residuals {spread:.2g} % over {len(law.used)} of {len(values)} trials"
        )
    return draw_scaling(series, sweep.metric, law)


def draw_curves(sweep: Sweep, trials: Sequence[FrozenTrial]) -> Figure:
    """Each curve against the token budget, a line for each trial with the spread over its seeds."""
    figure = Figure(figsize=(4.5 * len(sweep.curves), 3.8), layout="constrained")
    for index, curve in enumerate(sweep.curves):
        axes = figure.add_subplot(1, len(sweep.curves), index + 1)
        for trial in trials:
            names = budgets(trial, curve)
            spread = [over_seeds(sweep, trial, name) for name in names.values()]
            means, deviations = [mean for mean, _ in spread], [deviation for _, deviation in spread]
            axes.errorbar(list(names), means, deviations, marker="o", capsize=3, label=sweep.title(trial.params))
        axes.set(xscale="log", xlabel="tokens", title=curve)
        ticks = sorted({budget for trial in trials for budget in budgets(trial, curve)})
        axes.set_xticks(ticks, [str(budget) for budget in ticks])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.axes[0].legend(fontsize=7)
    return figure
