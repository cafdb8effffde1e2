"""Measure a whole set of images from a folder, shards, or a `.npz` file, which may also hold statistics."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any, Literal

import torch
from tqdm import tqdm

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.contracts import ImageSize
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
"""The single budget of images without budgets."""


class ImageSet:
    """A set of images, read later: given statistics, or pictures to compute them from, or both.

    The source is one of `open_pictures`, or a `.npz` file with `mu` and `sigma` of the network's features, for the
    Frechet distance. Pictures are cropped at the centre and resized to `image_size`, or left as they are.
    """

    def __init__(
        self,
        source: str,
        network: FeatureExtractor,
        image_size: ImageSize | None = None,
        batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        self.source, self._file = source, Path(source).expanduser()
        arrays = read_arrays(self._file, MOMENTS) if self._file.suffix == ".npz" else {ARRAY: None}
        self._moments = self._loader = None
        self.num_pictures = 0
        if set(MOMENTS) <= set(arrays):
            try:
                self._moments = FeatureStatistics.from_moments(*(torch.from_numpy(arrays[name]) for name in MOMENTS))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{self._file}: {error}") from error
            if self._moments.dim != network.dim:
                raise ValueError(
                    f"{self._file} holds statistics of {self._moments.dim} features, but extractor={network.name!r} "
                    f"has {network.dim}; choose the extractor of the statistics"
                )
        elif ARRAY not in arrays:
            raise ValueError(f"{source} holds {sorted(arrays)}; it needs pictures ({ARRAY}) or mu and sigma")
        if ARRAY in arrays:
            self._loader, self.num_pictures = open_pictures(source, image_size, batch_size, num_workers)
            if self.num_pictures < 2:
                raise ValueError(
                    f"{source} has {self.num_pictures} image; a distance needs two on each side: add images to it"
                )

    def add_to(self, statistics: GenerationStatistics[int], side: Literal["images", "reference"]) -> dict[str, Any]:
        """Measure the set as images of the budget `ONLY` or as real ones; returns its facts for records."""
        features = statistics.real if side == "reference" else statistics.made[ONLY]
        facts: dict[str, Any] = {"source": self.source, "num_samples": None}
        if self._loader is not None:
            ids: list[int] = []
            digest = 0
            for batch in tqdm(self._loader, desc=f"features of the {side}", unit="batch", leave=False):
                pixels, keys = to_uint8(batch["image"]), batch["key"]
                digest = images_hash(pixels, keys, digest)
                if side == "reference":
                    statistics.update_real(pixels, keys)
                else:
                    statistics.update_generated(ONLY, pixels, keys)
                ids += [key_hash(key) for key in keys]
            check_each_sample_once(torch.tensor(ids), self.num_pictures, False, self.source)
            facts |= {"num_samples": self.num_pictures, "pixels_hash": data_hash_text(digest)}
        if self._moments is not None:
            features.statistics = self._moments
            facts["statistics_sha256"] = hashlib.sha256(self._file.read_bytes()).hexdigest()
        return facts
