"""Image shards -> latent shards, so that the autoencoder runs once and not in every epoch.

Shapes in this file: B batch, S image side, (2C, h, w) posterior mean and log-variance of one image.
"""

from __future__ import annotations

import hashlib
import io
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok_pl.contracts import Batch
from flextok_pl.data.index import ShardError, ShardIndex, load_indices
from flextok_pl.data.samples import Collate
from flextok_pl.data.shards import Sample, shard_name, start_set, write_index, write_shard
from flextok_pl.data.stream import Plan, ShardSet, StreamedBatches
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

    View 0 of an image is its centre crop, the further ones are training augmentations; keys are `<key>_v<view>`.

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
    for name, value in (("num_views", num_views), ("batch_size", batch_size), ("samples_per_shard", samples_per_shard)):
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1")
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r} must be 'float16' or 'float32'")
    indices = load_indices(src)
    if "image" not in indices[0].fields:
        raise ShardError(f"{indices[0].folder} holds {list(indices[0].fields)}, no images to encode")
    arguments = {
        "writer": "latents",
        "source": [hashlib.sha256(index.to_json().encode()).hexdigest() for index in indices],
        "autoencoder": dict(source_id),
        "image_size": image_size,
        "num_views": num_views,
        "augmentation": vars(augmentation) if num_views > 1 else None,
        "seed": seed,
        "batch_size": batch_size,
        "dtype": dtype,
        "samples_per_shard": samples_per_shard,
    }
    folder = Path(dst)
    ready = start_set(folder, arguments, overwrite)
    if ready is not None:
        return ready
    data = ShardSet(indices)
    total = data.num_samples * num_views
    views = _views(data, image_size, num_views, augmentation, seed, batch_size, num_workers)
    samples = _encoded(views, encode, dtype)
    with tqdm(total=total, desc="latents", unit="sample") as bar:
        shards = []
        for number in range(-(-total // samples_per_shard)):
            shards.append(write_shard(folder / shard_name(number), _counted(islice(samples, samples_per_shard), bar)))
    provenance = {"autoencoder": dict(source_id), "images": [dict(index.provenance) for index in indices]}
    fields = ("latent", *(name for name in indices[0].fields if name in ("label", "text")))
    index = ShardIndex(folder, fields, tuple(shards), indices[0].classes, image_size, arguments, provenance)
    if index.num_samples != total:
        raise ShardError(f"{index.num_samples} latents were written instead of {total}")
    write_index(index)
    return index


def _views(
    data: ShardSet,
    image_size: int,
    num_views: int,
    augmentation: Augmentation,
    seed: int,
    batch_size: int,
    num_workers: int,
) -> Iterator[tuple[int, Batch]]:
    """All images once per view; each sample of the source exactly once, in an order that the arguments fix."""
    for view in range(num_views):
        collate = Collate(image_size, augmentation if view else None, seed)
        stream = StreamedBatches(data, collate, Plan(batch_size, train=False))
        stream.start_at(view)
        for batch in DataLoader(stream, batch_size=None, num_workers=num_workers):
            yield view, batch


def _encoded(views: Iterator[tuple[int, Batch]], encode: Encode, dtype: str) -> Iterator[Sample]:
    for view, batch in views:
        with torch.inference_mode():
            moments = encode(batch["image"]).to("cpu", getattr(torch, dtype))  # (B, 2C, h, w)
        if moments.ndim != 4 or len(moments) != len(batch["key"]) or moments.shape[1] % 2:
            shape = tuple(moments.shape)
            raise ValueError(f"encode gave {shape} for {len(batch['key'])} images, expected (B, 2C, h, w)")
        finite = moments.isfinite().flatten(1).all(1)
        for i, key in enumerate(batch["key"]):
            if not finite[i]:
                raise ValueError(f"the moments of {key!r} are not finite in {dtype}; try float32 or another encoder")
            buffer = io.BytesIO()
            np.save(buffer, moments[i].numpy())
            files = {"latent.npy": buffer.getvalue()}
            if "label" in batch:
                files["cls"] = str(int(batch["label"][i])).encode()
            if "text" in batch:
                files["txt"] = batch["text"][i].encode()
            yield Sample(f"{key}_v{view}", files)


def _counted(samples: Iterator[Sample], bar: tqdm[Any]) -> Iterator[Sample]:
    for sample in samples:
        bar.update()
        yield sample
