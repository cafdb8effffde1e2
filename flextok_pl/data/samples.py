"""Check and decode samples of shards, and collate them into batches.

Shapes in this file: B batch, C x H x W image, (2c, h, w) moments, K registers, L text positions, E text width, F
teacher width.
"""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, cast

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import get_worker_info

from flextok_pl.contracts import Batch, ImageSize, height_width
from flextok_pl.data.shards.index import ARRAYS, IMAGE_EXTENSIONS, ShardError, ShardIndex
from flextok_pl.data.transforms import Augmentation, augment, center_crop, decode_image, sample_generator, to_tensor

Decoded = dict[str, Any]
"""One decoded sample: its key and fields; the image is not yet cropped."""
STACKED = tuple(name for name in ARRAYS if name != "text_states")
"""Fields whose tensors have the same shape throughout a set."""


def in_batch(tensor: Tensor) -> Tensor:
    """Convert stored numbers to the types of batches: float32 or integers."""
    return tensor.to(torch.float32) if tensor.is_floating_point() else tensor


@dataclass
class Decoder:
    """Decodes the fields that an index states."""

    smallest_window: float | None = None  # allow partial decoding to twice the size needed, see `Augmentation`
    max_skipped: int | None = None  # broken samples to leave out with a warning before one raises; None raises at once
    counts: Tensor | None = None  # (W,) int64 in shared memory, where worker w counts the samples it left out
    channels: int = 3  # channels of pictures
    skipped: set[tuple[str, str]] = field(default_factory=set, init=False)

    def __call__(self, index: ShardIndex, raw: dict[str, Any], size: ImageSize | None = None) -> Decoded | None:
        """Decode a raw sample, or return None for one that is left out; an error names shard and key.

        `size` is the crop of its picture, if that may be decoded in part.
        """
        try:
            return _decode(index, raw, self.least(size), self.channels)
        except (ValueError, KeyError, OSError) as error:
            shard, key = raw["__url__"], raw["__key__"]
            problem = f"shard {shard}, sample {key!r}: {error}; repair the source and write the set again"
            if self.max_skipped is None:
                raise ShardError(problem) from error
            if shard not in {shard for shard, _ in self.skipped}:
                warnings.warn(f"{problem}. Training skips broken samples of this shard", stacklevel=2)
            self.skipped.add((shard, key))
            if self.counts is not None:
                worker = get_worker_info()
                self.counts[0 if worker is None else worker.id] = len(self.skipped)
            if len(self.skipped) > self.max_skipped:
                raise ShardError(
                    f"{problem}. These are {len(self.skipped)} broken samples in this process, more than max_skipped="
                    f"{self.max_skipped}"
                ) from error
        return None

    def least(self, size: ImageSize | None) -> tuple[int, int] | None:
        """Least width and height of a picture that is decoded in part; None to decode all of it."""
        if self.smallest_window is None or size is None:
            return None
        height, width = height_width(size)
        return ceil(2 * width / self.smallest_window), ceil(2 * height / self.smallest_window)


def _decode(index: ShardIndex, raw: dict[str, Any], least: tuple[int, int] | None, channels: int) -> Decoded:
    sample: Decoded = {"key": raw["__key__"]}
    for name, (extension, kinds, ndim, _) in ARRAYS.items():
        if name in index.fields:
            sample[name] = _array(raw, extension, kinds, ndim)
    if "image" in index.fields:
        extension = next((each for each in IMAGE_EXTENSIONS if each in raw), "")
        if not extension:
            raise ValueError("it has no picture (perhaps the shard is truncated)")
        sample["image"] = decode_image(raw[extension], least, channels)
    if "label" in index.fields:
        sample["label"] = _label(raw, len(index.classes))
    if "text" in index.fields:
        sample["text"] = _member(raw, "txt").decode("utf-8")
    return sample


def _member(raw: dict[str, Any], extension: str) -> bytes:
    if extension not in raw:
        raise ValueError(f"it has no .{extension} file (perhaps the shard is truncated)")
    content: bytes = raw[extension]
    return content


def _array(raw: dict[str, Any], extension: str, kinds: str, ndim: int) -> Tensor:
    content = io.BytesIO(_member(raw, extension))
    try:
        array: np.ndarray[Any, Any] = np.lib.format.read_array(content, allow_pickle=False)
    except Exception as error:  # NumPy parses the header as Python, which can raise anything
        raise ValueError(f"{extension} is not a complete array ({type(error).__name__}: {error})") from error
    if array.dtype.kind not in kinds or array.ndim != ndim:
        raise ValueError(f"{extension} has {array.dtype} of shape {array.shape}, expected {ndim} axes, kind {kinds!r}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(f"{extension} has values that are not finite")
    return torch.from_numpy(array if array.dtype.kind == "f" else array.astype(np.int64))


def _label(raw: dict[str, Any], num_classes: int) -> int:
    content = _member(raw, "cls")
    try:
        label = int(content)
    except ValueError:
        raise ValueError(f"label {content[:20]!r} is not an integer") from None
    if not -1 <= label < num_classes:
        raise ValueError(f"label {label} is outside 0..{num_classes - 1} (or -1, no class)")
    return label


def stacked(samples: Sequence[Decoded], name: str) -> Tensor:
    """Stack the tensors of N samples, (N, ...)."""
    _require_equal_shapes(samples, name)
    return torch.stack([sample[name] for sample in samples])


def padded(samples: Sequence[Decoded]) -> tuple[Tensor, Tensor]:
    """Pad the text states of B samples to the longest, float32 (B, L, E), and make their mask (B, L)."""
    _require_equal_shapes(samples, "text_states", first_axis=1)
    states = [sample["text_states"].to(torch.float32) for sample in samples]
    lengths = torch.tensor([len(state) for state in states])  # (B,)
    batch = pad_sequence(states, batch_first=True)  # (B, L, E)
    return batch, torch.arange(batch.shape[1]) < lengths[:, None]


def _require_equal_shapes(samples: Sequence[Decoded], name: str, first_axis: int = 0) -> None:
    for sample in samples:
        if sample[name].shape[first_axis:] != samples[0][name].shape[first_axis:]:
            shapes = [f"{s['key']!r} has {tuple(s[name].shape)}" for s in (samples[0], sample)]
            raise ShardError(f"samples differ in the shape of their {name}: {', '.join(shapes)}; write the set again")


@dataclass(frozen=True)
class Collate:
    """Turns decoded samples into a `Batch`."""

    image_size: ImageSize
    augmentation: Augmentation | None  # None for the evaluation crop
    seed: int  # seed of the augmentations

    def __call__(self, samples: Sequence[Decoded], epoch: int, shape: ImageSize | None = None) -> Batch:
        """Make one batch of a shape, default `image_size`; augmentations depend on (seed, epoch, key) only."""
        size = self.image_size if shape is None else shape
        batch: dict[str, Any] = {"key": [sample["key"] for sample in samples]}
        first = samples[0]
        if "image" in first:
            batch["image"] = to_tensor([self.picture(s["image"], s["key"], epoch, size) for s in samples])  # BCHW
        for name in STACKED:
            if name in first:
                batch[name] = in_batch(stacked(samples, name))  # (B, 2c, h, w), (B, F, h', w'), (B, K)
        if "label" in first:
            batch["label"] = torch.tensor([s["label"] for s in samples], dtype=torch.int64)  # (B,)
        if "text" in first:
            batch["text"] = [s["text"] for s in samples]
        if "text_states" in first:
            batch["text_states"], batch["text_mask"] = padded(samples)  # (B, L, E), (B, L)
        return cast(Batch, batch)

    def picture(self, image: Image.Image, key: str, epoch: int, size: ImageSize) -> Image.Image:
        """Crop or augment a picture of any size to this size."""
        if self.augmentation is None:
            return center_crop(image, size)
        return augment(image, size, self.augmentation, sample_generator(self.seed, epoch, key))
