"""Measure the results of searches against their cost: records, and one picture of many runs.

B images, H x W pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import torch
from matplotlib.figure import Figure

from flextok_pl.backbones.clip_score import CLIPScore
from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.contracts import ImageSize, checked_size
from flextok_pl.data.pictures import read_picture
from flextok_pl.data.transforms import to_tensor
from flextok_pl.evaluation.generation_statistics import Classifier, GenerationStatistics
from flextok_pl.evaluation.image_set import ONLY, ImageSet
from flextok_pl.evaluation.report import Record
from flextok_pl.metrics.feature_set import POOL_SIZE, FeatureSet
from flextok_pl.metrics.images import to_uint8
from flextok_pl.search.records import FREE, mean_score, read_run

SIZES = ("num_candidates", "beam_width")
"""Options that grow with a run's cost, along a line of the plot."""

COSTS = ("decoder_calls", "decoded_images", "prior_positions", "verifier_calls")
"""Counters of a search; see `Cost`."""


def reference_features(
    source: str, extractor: FeatureExtractor, image_size: ImageSize, num_workers: int = 0
) -> tuple[FeatureSet, dict[str, Any]]:
    """Features of real images, and their facts for records; see `ImageSet`."""
    images = ImageSet(source, extractor, image_size, num_workers=num_workers)
    share = min(1.0, POOL_SIZE / max(1, images.num_pictures))
    statistics = GenerationStatistics[int]([], extractor, real_pool_fraction=share)
    facts = images.add_to(statistics, "reference")
    return statistics.real, facts


def image_size(folder: Path) -> ImageSize:
    """Size in pixels of the images of a finished run."""
    _, run = read_run(folder)
    image = read_picture(folder / run[0]["results"][0]["image"])
    return checked_size((image.height, image.width))


def measure_run(
    folder: Path,
    extractor: FeatureExtractor,
    classifier_of: Callable[[Mapping[str, Any]], Classifier | None] = lambda protocol: None,
    clip: CLIPScore | None = None,
    real: FeatureSet | None = None,
    batch_size: int = 64,
    seed: int = 0,
) -> list[Record]:
    """Measure the best image of each prompt of a finished run.

    Args:
        folder: folder of the run.
        extractor: feature network of distances and of a probe.
        classifier_of: makes the classifier for a run of this protocol.
        clip: scores images by the prompts' texts.
        real: features of real images; without them there are no distances.
        batch_size: images at a time.
        seed: seed of the kernel distance's subsets.

    Returns:
        One record per metric of `GenerationStatistics`, and one of `verifier_score`, the mean score of the chosen
        images, if all are finite. Each states the run, its cost per prompt, and its search options.

    Raises:
        ValueError: the folder holds no finished run, or there is nothing to measure.
    """
    protocol, run = read_run(folder)
    judge = classifier_of(protocol)
    pool = min(1.0, POOL_SIZE / len(run))
    statistics = GenerationStatistics[int]([ONLY], extractor, pool, judge, real, clip)
    for start in range(0, len(run), batch_size):
        part = run[start : start + batch_size]
        images = to_uint8(to_tensor([read_picture(folder / each["results"][0]["image"]) for each in part]))
        labels = torch.tensor([each["label"] for each in part])
        keys, texts = [each["key"] for each in part], [each["text"] for each in part]
        statistics.update_generated(ONLY, images, keys, labels, texts)
    values = statistics.values(seed)[ONLY]
    score = mean_score(run)
    if score is not None:
        values["verifier_score"] = score
    if not values:
        raise ValueError(f"{folder} has infinite scores, which have no mean: measure by a reference or classifier")
    facts = {
        "run": str(folder),
        **{name: fmean(each["cost"][name] for each in run) for name in COSTS},
        "num_samples": len(run),
        "image_size": statistics.image_size,
        "full_rank": all(f.statistics.full_rank for f in (statistics.real, *statistics.made.values())),
        "classifier": None if judge is None else judge.name,
        "search": protocol,
    }
    return [{"metric": m, "value": v, **facts, **statistics.how.get(m, {})} for m, v in values.items()]


def plot_quality(records: Sequence[Record], against: str = "decoder_calls") -> Figure:
    """One panel per metric against one of `COSTS` per prompt; runs that differ in `SIZES` only share a line.

    Runs that differ only in their seeds become one point, with their standard deviation. Best-of-N with one candidate
    is direct sampling, which a dashed line shows.
    """
    metrics = list(dict.fromkeys(record["metric"] for record in records))
    names = _line_names(records)
    columns = min(4, len(metrics))
    rows = math.ceil(len(metrics) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.8 * rows + 0.5), dpi=120, layout="constrained")
    lines = list(dict.fromkeys(names))
    for i, metric in enumerate(metrics):
        axes = figure.add_subplot(rows, columns, i + 1)
        for j, line in enumerate(lines):
            of_line = [r for r, name in zip(records, names, strict=True) if name == line and r["metric"] == metric]
            points = sorted(_points(of_line, against))
            x, y, spread = zip(*points, strict=True) if points else ((), (), ())
            axes.errorbar(x, y, spread, marker="o", markersize=4, capsize=2, color=f"C{j}", label=line)
            direct = [r["value"] for r in of_line if _is_direct(r)]
            if direct:
                label = line.replace("best_of_n", "direct sampling", 1)
                axes.axhline(fmean(direct), color=f"C{j}", linestyle="--", linewidth=1, label=label)
        if all(record[against] > 0 for record in records):
            axes.set_xscale("log", base=2)
        axes.set_title(metric, fontsize=9)
        axes.set_xlabel(f"{against.replace('_', ' ')} per prompt", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(4, len(labels)), fontsize=8)
    return figure


def _line_names(records: Sequence[Record]) -> list[str]:
    """The line of each record: its algorithm, and the options except `SIZES` and seed in which searches differ."""
    searches = [record["search"] for record in records]
    known = dict.fromkeys(name for search in searches for name in search)
    aside = {*SIZES, *FREE, "seed", "algorithm"}
    varied = [n for n in known if n not in aside and any(s.get(n) != searches[0].get(n) for s in searches)]
    return [", ".join([s["algorithm"], *(f"{name}={_short(s.get(name))}" for name in varied)]) for s in searches]


def _short(value: Any) -> Any:
    return value["verifier"] if isinstance(value, Mapping) and "verifier" in value else value


def _points(records: Sequence[Record], against: str) -> list[tuple[float, float, float]]:
    """Cost, mean value and its standard deviation over seeds."""
    found: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        found.setdefault(tuple(record["search"].get(name) for name in SIZES), []).append(record)
    return [
        (
            fmean(r[against] for r in same),
            fmean(r["value"] for r in same),
            stdev(r["value"] for r in same) if len(same) > 1 else 0.0,
        )
        for same in found.values()
    ]


def _is_direct(record: Mapping[str, Any]) -> bool:
    return (record["search"]["algorithm"], record["search"]["num_candidates"]) == ("best_of_n", 1)
