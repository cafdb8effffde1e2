"""`flextok fid`: distances and scores of images against reference images; `flextok compare`: two files of these."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flextok_pl.backbones.extractors import INCEPTION, build_extractor
from flextok_pl.cli.tools import default_device
from flextok_pl.contracts import ImageSize, checked_size
from flextok_pl.data.transforms import crop_name
from flextok_pl.evaluation.generation_statistics import GenerationStatistics
from flextok_pl.evaluation.image_set import ONLY, ImageSet
from flextok_pl.evaluation.protocol import extractor_facts, versions
from flextok_pl.evaluation.report import (
    Record,
    format_columns,
    format_value,
    protocol_differences,
    read_records,
    write_json,
)


def compare_images(
    images: str,
    reference: str,
    extractor: str = INCEPTION,
    weights: str | None = None,
    image_size: ImageSize | None = None,
    batch_size: int = 64,
    num_workers: int = 2,
    pool_size: int = 10_000,
    inception_splits: int = 10,
    seed: int = 0,
    json: str | None = None,
    device: str | None = None,
) -> None:
    """Measure images against reference images: Frechet and kernel distance, inception score, manifold scores.

    Both are a folder of images, a shard set, a pattern of shard sets, or a `.npz` file. A `.npz` file has pictures as
    `arr_0`, or statistics as `mu` and `sigma`. Statistics alone allow only the Frechet distance. If a file has both, as
    the reference batches of guided diffusion do, the Frechet distance uses its statistics and all else its pictures.

    Args:
        images: images to measure.
        reference: real images, or their statistics.
        extractor: feature network: `inception-v3-compat` for FID and KID, `dinov2-*`, `clip-*`, or `effnet-lite0`
            (offline).
        weights: local weights file of the network; default the packaged or downloaded one.
        image_size: side in pixels of the centre square to cut from each picture, or [height, width] of a rectangle;
            default the whole picture.
        batch_size: pictures per batch.
        num_workers: processes that decode pictures.
        pool_size: about this many samples of each side, chosen by key, give the kernel distance and the manifold
            scores.
        inception_splits: number of parts over which the inception score is averaged.
        seed: seed of the kernel distance's subsets.
        json: file to write the records to, one for each number with its protocol.
        device: default a GPU if available.
    """
    if pool_size < 2:
        raise ValueError(f"pool_size={pool_size} must be at least 2")
    network = build_extractor(extractor, weights).to(default_device(device))
    sides = [ImageSet(each, network, image_size, batch_size, num_workers) for each in (images, reference)]
    pools = [min(1.0, pool_size / max(1, side.num_pictures)) for side in sides]
    statistics = GenerationStatistics(
        [ONLY], network, pools[0], real_pool_fraction=pools[1], inception_splits=inception_splits
    )
    facts = {"images": sides[0].add_to(statistics, "images"), "reference": sides[1].add_to(statistics, "reference")}
    values = statistics.values(seed)[ONLY]
    full_rank = all(features.statistics.full_rank for features in (statistics.real, statistics.made[ONLY]))
    protocol = {
        "num_samples": facts["images"]["num_samples"],
        **facts,
        "full_rank": full_rank,
        "image_size": statistics.image_size,
        "crop": None if image_size is None else crop_name(checked_size(image_size)),
        **extractor_facts(network),
        "pool_size": pool_size,
        "inception_splits": inception_splits,
        "seed": seed,
        "device": network.device.type,
        "versions": versions(),
    }
    print(format_columns([["metric", "value"], *([name, format_value(value)] for name, value in values.items())]))
    print(f"{_counted(images, facts['images'])} against {_counted(reference, facts['reference'])}; {network.name}")
    if not full_rank:
        print(
            f"compare {network.metric_name} only with others of as many images: one side has at most {network.dim} "
            f"images, the number of features, so its covariance is singular; prefer {network.kernel_metric_name}"
        )
    if json is not None:
        how = statistics.how
        write_json([{"metric": m, "value": v, **protocol, **how.get(m, {})} for m, v in values.items()], Path(json))


def compare_records(first: str, second: str) -> None:
    """Show two files of records side by side, and where their protocols differ.

    Args:
        first: JSON file from `flextok fid` or an evaluation.
        second: another one.
    """
    files = [read_records(Path(file)) for file in (first, second)]
    axes = sorted({axis for records in files for axis in _axes(records)})
    one, two = ({(r["metric"], *(_text(r.get(axis)) for axis in axes)): r for r in records} for records in files)
    common = [key for key in one if key in two]
    if not common:
        raise ValueError(f"{first} and {second} have no metric at the same {', '.join(axes) or 'settings'} in common")
    rows = [["metric", *("tokens" if axis == "num_tokens" else axis for axis in axes), "first", "second"]]
    rows += [[*key, *(format_value(side[key]["value"]) for side in (one, two))] for key in common]
    print(format_columns(rows))
    differences: dict[str, tuple[Any, Any]] = {}
    for key in common:
        differences |= protocol_differences(one[key], two[key])
    if not differences:
        print("the protocols are the same")
    for name, (left, right) in differences.items():
        print(f"differs in {name}: {left} and {right}")


def _axes(records: Sequence[Record]) -> set[str]:
    """The fields that distinguish the records of a metric, such as the number of tokens, the position or the steps."""
    first: dict[str, Mapping[str, Any]] = {}
    return {
        name
        for record in records
        for name, value in record.items()
        if name not in ("value", "bits_per_image") and first.setdefault(record["metric"], record).get(name) != value
    }


def _text(value: object) -> str:
    return "" if value is None else str(value)


def _counted(source: str, facts: dict[str, Any]) -> str:
    count = facts["num_samples"]
    return source if count is None else f"{source} ({count} images)"
