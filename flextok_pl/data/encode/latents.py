"""Write image shards as latent shards, so that autoencoder and teacher run once and not in every epoch.

Shapes in this file: B batch, S image side, (2C, h, w) posterior mean and log-variance of one image, F teacher width.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from flextok_pl.contracts import Batch
from flextok_pl.data.encode.encoded import Encoding, npy, require_identity, write_encoded
from flextok_pl.data.shards.index import ShardIndex

Encode = Callable[[Tensor], Tensor]
"""(B, 3, S, S) in [-1, 1] -> (B, 2C, h, w), the posterior's mean and log-variance, unscaled."""

Extract = Callable[[Tensor], Tensor]
"""(B, 3, S, S) in [-1, 1] -> (B, F, h', w'), a teacher's features of patches."""


def write_latents(
    src: str | list[str],
    dst: Path | str,
    encode: Encode,
    *,
    source_id: Mapping[str, Any],
    extract: Extract | None = None,
    teacher_id: Mapping[str, Any] | None = None,
    dtype: Literal["float16", "float32"] = "float16",
    **options: Any,
) -> ShardIndex:
    """Encode image shards and write the moments, with label, text and a teacher's features, as latent shards.

    Repeat an interrupted run to resume it.

    Args:
        src: image shard set(s), as for `ShardDataModule`.
        dst: folder for the new set.
        encode: the autoencoder's moments; gets batches on the CPU and may move them.
        source_id: JSON types that identify the autoencoder (path or id, checksum, scaling). It goes into the index, so
            that a set of another autoencoder is not reused.
        extract: REPA's teacher; its features of the same views are stored too.
        teacher_id: JSON types that identify the teacher, with `name` and `sha256`. It goes into the index; sets of
            different teachers cannot be read together.
        dtype: type of the stored numbers.
        **options: those of `Encoding`.

    Raises:
        ValueError: an option is out of range, the source holds no images, or a model's output is invalid.
    """
    encoding = Encoding(**options)
    if dtype not in ("float16", "float32"):
        raise ValueError(f"dtype={dtype!r} must be 'float16' or 'float32'")
    if (extract is None) != (teacher_id is None):
        raise ValueError("extract and teacher_id belong together: give both or none")
    made_by, fields = {"autoencoder": dict(source_id)}, ["latent"]
    if teacher_id is not None:
        require_identity("teacher_id", teacher_id, {"name": str, "sha256": str})
        made_by["teacher"] = dict(teacher_id)
        fields.append("teacher_features")

    def files(batch: Batch) -> list[dict[str, bytes]]:
        images, keys = batch["image"], batch["key"]
        moments = encode(images)
        if moments.ndim != 4 or len(moments) != len(keys) or moments.shape[1] % 2:
            raise ValueError(f"encode gave {tuple(moments.shape)} for {len(keys)} images, expected (B, 2C, h, w)")
        samples = [{"latent.npy": array} for array in _stored(moments, keys, "moments", dtype)]
        if extract is not None:
            features = extract(images)
            if features.ndim != 4 or len(features) != len(keys):
                raise ValueError(
                    f"extract gave {tuple(features.shape)} for {len(keys)} images, expected (B, F, h', w')"
                )
            for sample, array in zip(samples, _stored(features, keys, "teacher's features", dtype), strict=True):
                sample["features.npy"] = array
        return samples

    return write_encoded(
        src, dst, files, encoding, writer="latents", fields=fields, made_by=made_by, options={"dtype": dtype}
    )


def _stored(tensor: Tensor, keys: Sequence[str], name: str, dtype: str) -> list[bytes]:
    """Check the numbers of each picture, (B, ...), and serialise them as files."""
    tensor = tensor.to("cpu", getattr(torch, dtype))
    for key, finite in zip(keys, tensor.isfinite().flatten(1).all(1), strict=True):
        if not finite:
            raise ValueError(f"the {name} of {key!r} are not finite in {dtype}; try float32 or another network")
    return [npy(array) for array in tensor.numpy()]
