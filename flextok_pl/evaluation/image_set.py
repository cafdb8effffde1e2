"""A set of images that is measured as a whole: in a folder, in shards, or in a `.npz` file, also with statistics."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.contracts import Batch
from flextok_pl.data.pictures import ARRAY, open_pictures, read_arrays
from flextok_pl.evaluation.generation_statistics import GenerationStatistics
from flextok_pl.evaluation.protocol import data_hash_text
from flextok_pl.evaluation.statistics import check_each_sample_once
from flextok_pl.keys import images_hash, key_hash
from flextok_pl.metrics.frechet import FeatureStatistics
from flextok_pl.metrics.images import to_uint8

MOMENTS = ("mu", "sigma")
"""Names of mean and covariance in a `.npz` file."""

ONLY = 0
"""The one budget of images that have none."""


@dataclass
class ImageSet:
    """A set of images: statistics that someone took, or pictures to take them from, or both.

    Attributes:
        source: where it is.
        given: the statistics, which serve the Frechet distance.
        loader: of the pictures, which serve all else.
        num_pictures: their number.
    """

    source: str
    given: FeatureStatistics | None
    loader: DataLoader[Batch] | None
    num_pictures: int

    def add_to(self, statistics: GenerationStatistics[int], side: Literal["images", "reference"]) -> dict[str, Any]:
        """Measure the set, as the images of the budget `ONLY` or as the real ones.

        Returns:
            What a record says about it.

        Raises:
            ValueError: it has fewer than two pictures, or of different sizes.
        """
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
            check_each_sample_once(torch.tensor(ids), self.num_pictures, False, self.source)
            if self.num_pictures < 2:
                raise ValueError(f"{self.source} has {self.num_pictures} image; a distance needs two on either side")
            facts |= {"num_samples": self.num_pictures, "pixels_hash": data_hash_text(digest)}
        if self.given is not None:
            features.statistics = self.given
            facts["statistics_sha256"] = hashlib.sha256(Path(self.source).expanduser().read_bytes()).hexdigest()
        return facts


def open_image_set(
    source: str, network: FeatureExtractor, image_size: int | None = None, batch_size: int = 64, num_workers: int = 0
) -> ImageSet:
    """A set, not yet read.

    Args:
        source: as `open_pictures` takes it, or a `.npz` file with `mu` and `sigma`.
        network: of whose features the statistics are.
        image_size: side of the centre square to take of each picture; None takes them as they are.
        batch_size: pictures at a time.
        num_workers: processes that decode.

    Raises:
        ValueError: there is nothing, or statistics of another network.
    """
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
    return ImageSet(source, given, loader, count)


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
