"""`flextok fid`: distances and scores of one set of images against another; `flextok compare`: their records."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok_pl.callbacks.evaluation import extractor_facts, versions
from flextok_pl.cli.tools import default_device, run_tool
from flextok_pl.contracts import Batch
from flextok_pl.data.pictures import ARRAY, open_pictures, read_arrays
from flextok_pl.data.transforms import CENTER_CROP
from flextok_pl.metrics.features import INCEPTION, FeatureExtractor, build_extractor
from flextok_pl.metrics.frechet import FeatureStatistics
from flextok_pl.metrics.generation import GenerationStatistics
from flextok_pl.metrics.images import to_uint8
from flextok_pl.metrics.keys import images_hash, key_hash
from flextok_pl.metrics.reconstruction import check_each_sample_once
from flextok_pl.metrics.report import format_columns, format_value, protocol_differences, read_records, write_json

MOMENTS = ("mu", "sigma")
"""Names of mean and covariance in a `.npz` file."""

ONLY = 0
"""The one budget, since these images have none."""


def fid(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok fid`."""
    run_tool(compare_images, command, arguments)


def compare(command: str, arguments: Sequence[str]) -> None:
    """Run `flextok compare`."""
    run_tool(compare_records, command, arguments)


def compare_images(
    images: str,
    reference: str,
    extractor: str = INCEPTION,
    weights: str | None = None,
    image_size: int | None = None,
    batch_size: int = 64,
    num_workers: int = 2,
    pool_size: int = 10_000,
    inception_splits: int = 10,
    seed: int = 0,
    json: str | None = None,
    device: str | None = None,
) -> None:
    """Measure images against reference images: Frechet and kernel distance, inception score, manifold scores.

    Both are a folder of images, a shard set or a pattern of them, or a `.npz` file: pictures as `arr_0`, or statistics
    as `mu` and `sigma`, of which only the Frechet distance can be taken. Where a file has both, as the reference
    batches of guided diffusion have, its statistics serve the Frechet distance and its pictures all else.

    Args:
        images: the images to measure.
        reference: real images, or their statistics.
        extractor: feature network: `inception-v3-compat` for FID and KID, `dinov2-*`, `clip-*`, or `effnet-lite0`
            (offline).
        weights: a local file with its weights; default the packaged or downloaded ones.
        image_size: side in pixels of the centre square to take of each picture; default as they are.
        batch_size: pictures at a time.
        num_workers: processes that decode.
        pool_size: about this many samples of the larger side, chosen by key, serve the kernel distance and the
            manifolds, and the same share of the smaller one.
        inception_splits: parts of the images over which the inception score is averaged.
        seed: of the kernel distance's subsets.
        json: file for the records, which state every number with its protocol.
        device: default a GPU where there is one.
    """
    if pool_size < 2:
        raise ValueError(f"pool_size={pool_size} must be at least 2")
    network = build_extractor(extractor, weights).to(default_device(device))
    sides = {
        "images": _open(images, network, image_size, batch_size, num_workers),
        "reference": _open(reference, network, image_size, batch_size, num_workers),
    }
    most = max(side.num_pictures for side in sides.values())
    share = min(1.0, pool_size / max(1, most))
    statistics = GenerationStatistics([ONLY], network, share, inception_splits=inception_splits)
    facts = {name: side.add_to(statistics, name) for name, side in sides.items()}
    values = statistics.values(seed)[ONLY]
    full_rank = all(features.statistics.full_rank for features in (statistics.real, statistics.made[ONLY]))
    protocol = {
        "num_samples": facts["images"]["num_samples"],
        **facts,
        "full_rank": full_rank,
        "image_size": statistics.image_size,
        "crop": None if image_size is None else CENTER_CROP,
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
            f"a side has no more samples than {network.dim} features: the covariance is singular and "
            f"{network.metric_name} compares at equal numbers only; prefer {network.kernel_metric_name}"
        )
    if json is not None:
        write_json([{"metric": name, "value": value, **protocol} for name, value in values.items()], Path(json))


def compare_records(first: str, second: str) -> None:
    """Show two files of records side by side, and in what their protocols differ.

    Args:
        first: JSON file that `flextok fid` or an evaluation wrote.
        second: another one.
    """
    one, two = ({(r["metric"], r.get("num_tokens")): r for r in read_records(Path(file))} for file in (first, second))
    common = [key for key in one if key in two]
    if not common:
        raise ValueError(f"{first} and {second} have no metric at a token budget in common")
    rows = [["metric", "tokens", "first", "second"]]
    for name, budget in common:
        values = [format_value(side[name, budget]["value"]) for side in (one, two)]
        rows.append([name, "" if budget is None else str(budget), *values])
    print(format_columns(rows))
    differences: dict[str, tuple[Any, Any]] = {}
    for key in common:
        differences |= protocol_differences(one[key], two[key])
    if not differences:
        print("the protocols are the same")
    for name, (left, right) in differences.items():
        print(f"differs in {name}: {left} and {right}")


@dataclass
class _Side:
    """A set of images: statistics that someone took, or pictures to take them from, or both."""

    source: str
    given: FeatureStatistics | None
    loader: DataLoader[Batch] | None
    num_pictures: int

    def add_to(self, statistics: GenerationStatistics, side: str) -> dict[str, Any]:
        """Measure the pictures, as `images` or `reference`; returns what a record says about them."""
        features = statistics.real if side == "reference" else statistics.made[ONLY]
        facts: dict[str, Any] = {"source": self.source, "num_samples": None}
        if self.loader is not None:
            ids: list[int] = []
            digest = 0
            for batch in tqdm(self.loader, desc=f"features of the {side}", unit="batch", leave=False):
                pixels, keys = to_uint8(batch["image"]), batch["key"]
                if side == "reference":
                    statistics.update_real(pixels, keys)
                    digest = statistics.data_hash
                else:
                    statistics.update_generated(ONLY, pixels, keys)
                    digest = images_hash(pixels, keys, digest)
                ids += [key_hash(key) for key in keys]
            check_each_sample_once(ids, self.num_pictures, False, torch.device("cpu"), self.source)
            if self.num_pictures < 2:
                raise ValueError(f"{self.source} has {self.num_pictures} image; a distance needs two on either side")
            facts |= {"num_samples": self.num_pictures, "pixels_hash": f"{digest % 2**64:016x}"}
        if self.given is not None:
            features.statistics = self.given
            facts["statistics_sha256"] = hashlib.sha256(Path(self.source).expanduser().read_bytes()).hexdigest()
        return facts


def _open(source: str, network: FeatureExtractor, image_size: int | None, batch_size: int, num_workers: int) -> _Side:
    path = Path(source).expanduser()
    given, has_pictures = None, True
    if path.suffix == ".npz":
        arrays = read_arrays(path, MOMENTS)
        has_pictures = ARRAY in arrays
        if set(MOMENTS) <= set(arrays):
            given = _statistics_of(path, arrays, network)
        elif not has_pictures:
            raise ValueError(f"{source} holds {sorted(arrays)}; needed are pictures ({ARRAY}) or mu and sigma")
    loader, count = open_pictures(source, image_size, batch_size, num_workers) if has_pictures else (None, 0)
    return _Side(source, given, loader, count)


def _statistics_of(path: Path, arrays: dict[str, Any], network: FeatureExtractor) -> FeatureStatistics:
    try:
        mean, covariance = (torch.from_numpy(arrays[name]) for name in MOMENTS)
        statistics = FeatureStatistics.from_moments(mean, covariance)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from error
    if statistics.dim != network.dim:
        raise ValueError(
            f"{path} holds statistics of {statistics.dim} features, but extractor={network.name!r} has {network.dim}; "
            "choose the extractor that they were taken with"
        )
    return statistics


def _counted(source: str, facts: dict[str, Any]) -> str:
    count = facts["num_samples"]
    return source if count is None else f"{source} ({count} images)"
