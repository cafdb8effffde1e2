"""Image shards -> latent shards, so that the autoencoder runs once and not in every epoch.

Shapes in this file: B batch, S image side, (2C, h, w) posterior mean and log-variance of one image.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flextok_pl.contracts import Batch
from flextok_pl.data.encoded import Views, npy, write_encoded
from flextok_pl.data.index import ShardIndex
from flextok_pl.data.transforms import DEFAULT_AUGMENTATION, Augmentation

Encode = Callable[[Tensor], Tensor]
"""(B, 3, S, S) in [-1, 1] -> (B, 2C, h, w), the posterior's mean and log-variance, unscaled."""


def write_latents(
    src: str | list[str],
    dst: Path | str,
    encode: Encode,
    *,
    source_id: Mapping[str, Any],
    image_size: int = 256,
    num_views: int = 1,
    augmentation: Augmentation = DEFAULT_AUGMENTATION,
    seed: int = 0,
    batch_size: int = 64,
    num_workers: int = 2,
    dtype: Literal["float16", "float32"] = "float16",
    samples_per_shard: int = 4000,
    overwrite: bool = False,
) -> ShardIndex:
    """Encode image shards and write the moments, with label and text, as latent shards.

    View 0 of an image is its centre crop, the further ones are training augmentations; keys are `<key>_v<view>`. An
    interrupted run is gone on with when it is repeated.

    Args:
        src: image shard set(s), as for `ShardDataModule`.
        dst: folder of the new set.
        encode: the autoencoder's moments; gets batches on the CPU and may move them.
        source_id: JSON types that identify the autoencoder (path or id, checksum, scaling); goes into the index, and a
            set made by another one is not taken for this.
        image_size: S.
        num_views: samples per image.
        augmentation: of views 1, 2, ...
        seed: of the augmentations.
        batch_size: images per call of `encode`.
        num_workers: processes that decode images.
        dtype: of the stored moments.
        samples_per_shard: latents per tar file.
        overwrite: replace a set that was made with other arguments.

    Returns:
        The index of the new set.

    Raises:
        ValueError: an option is out of range, the source holds no images, or the moments are unusable.
    """
    views = Views(image_size, num_views, augmentation, seed, batch_size, num_workers, samples_per_shard)
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r} must be 'float16' or 'float32'")

    def files(batch: Batch) -> list[dict[str, bytes]]:
        keys = batch["key"]
        moments = encode(batch["image"]).to("cpu", getattr(torch, dtype))  # (B, 2C, h, w)
        if moments.ndim != 4 or len(moments) != len(keys) or moments.shape[1] % 2:
            raise ValueError(f"encode gave {tuple(moments.shape)} for {len(keys)} images, expected (B, 2C, h, w)")
        for key, finite in zip(keys, moments.isfinite().flatten(1).all(1), strict=True):
            if not finite:
                raise ValueError(f"the moments of {key!r} are not finite in {dtype}; try float32 or another encoder")
        return [{"latent.npy": npy(array)} for array in moments.numpy()]

    return write_encoded(
        src,
        dst,
        files,
        views,
        writer="latents",
        fields=("latent",),
        made_by={"autoencoder": dict(source_id)},
        options={"dtype": dtype},
        overwrite=overwrite,
    )
