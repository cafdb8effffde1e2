"""What is computed from real images, kept on disk between evaluations of the same data with the same extractor."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import torch

from flextok_pl.backbones.extractors import FeatureExtractor
from flextok_pl.files import write_file
from flextok_pl.metrics.feature_set import FeatureSet

T = TypeVar("T")


class StatisticsCache:
    """One file, named by a hash of everything that its content depends on.

    Args:
        folder: where the files are.
        data_hash: identity of the stored images and of what is done to them when they are loaded.
        extractor: of the features.
        samples: number of images.
        share: share of them that is measured.
        pool: share of those whose features are kept.
    """

    def __init__(
        self, folder: Path, data_hash: str, extractor: FeatureExtractor, samples: int, share: float, pool: float
    ) -> None:
        key = [data_hash, extractor.name, extractor.weights_hash, extractor.resize, samples, share, pool]
        self.file = folder / f"{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]}.pt"

    def exists(self) -> bool:
        """Whether this process can read the file."""
        return self.file.is_file()

    def load(self) -> FeatureSet:
        """The features kept.

        Raises:
            ValueError: the file is damaged.
        """
        return load_kept(self.file, FeatureSet.from_state_dict)

    def store_or_check(self, features: FeatureSet, pixel_hash: int) -> None:
        """Keep the features; or where they came from the file, check that they were of the images now evaluated.

        Args:
            features: of all originals.
            pixel_hash: of the same originals.

        Raises:
            RuntimeError: the images have changed under the same data hash. The file is deleted.
        """
        if self.exists():
            kept = load_kept(self.file, lambda state: state["pixel_hash"])
            if kept.item() != pixel_hash:
                self.file.unlink()
                raise RuntimeError(
                    f"the cached statistics {self.file} were of other images, so no number is reported; the file is "
                    "deleted: run again"
                )
            return
        keep(self.file, {**features.state_dict(), "pixel_hash": torch.tensor(pixel_hash)})


def keep(file: Path, state: dict[str, Any]) -> None:
    """Write tensors under a file's final name only when they are complete."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    write_file(file, buffer.getvalue())


def load_kept(file: Path, restore: Callable[[dict[str, Any]], T]) -> T:
    """What `restore` makes of the tensors of a file that `keep` wrote.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return restore(torch.load(file, map_location="cpu", weights_only=True))
    except Exception as error:  # the unpickler has no error of its own: damaged bytes raise whatever they lead to
        raise ValueError(f"the cached {file} is damaged ({error!r}); delete the file") from error
