"""Encode the pictures of image shards once and write them as a new set: the part that latents and tokens share.

Each view goes through all pictures once, in stored order (with several shapes in the order of an evaluation), in
batches that do not depend on the number of workers. So a set is a function of its arguments, and an interrupted run
resumes at the batch in which its first missing shard begins. View 0 of a picture is its centre crop, the others are
training augmentations; keys are `<key>_v<view>`.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice, takewhile
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok_pl.contracts import Batch, by_all_weights, checked_size, height_width
from flextok_pl.data.buckets import checked_shapes
from flextok_pl.data.encode.ranks import WriterRank
from flextok_pl.data.samples import Collate, Decoder
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.sizes import size_text
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.writer import Sample, complete_shard, shard_name, shard_sizes, write_index, write_shard
from flextok_pl.data.stream import EpochPlan, ShardSet, StreamedBatches
from flextok_pl.data.transforms import DEFAULT_AUGMENTATION, Augmentation, check_channels
from flextok_pl.distributed import launched
from flextok_pl.precision import frozen_networks_in

Encoder = Callable[[Batch], Iterable[dict[str, bytes]]]
"""Maps a batch of B pictures to the files of each one's new fields, by extension."""


@dataclass(frozen=True)
class Encoding:
    """How to go through the pictures of a set, once per view, and how to write the new set.

    Args:
        image_size: side in pixels of the pictures to encode, or [height, width].
        num_views: samples per picture: its centre crop, and random changes of it.
        augmentation: the random changes.
        seed: seed of the changes.
        batch_size: pictures at a time.
        num_workers: processes that decode pictures; the set does not depend on it.
        samples_per_shard: samples per tar file.
        overwrite: replace a set that was made with other arguments.
        compute_dtype: `float32`, or `bfloat16` to run the networks under autocast, which is faster on devices that
            support it. It changes latents slightly and some tokens; the index records it.
        shapes: several [height, width] instead of `image_size`: each picture is encoded in the one with the nearest
            aspect ratio, as with `data.shapes`.
        channels: channels of the pictures: 3, or 1 for grey, or 4 for colour with opacity.
    """

    image_size: int | tuple[int, int] = 256
    num_views: int = 1
    augmentation: Augmentation = DEFAULT_AUGMENTATION
    seed: int = 0
    batch_size: int = 64
    num_workers: int = 2
    samples_per_shard: int = 4000
    overwrite: bool = False
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    shapes: list[tuple[int, int]] | None = None
    channels: int = 3

    def __post_init__(self) -> None:
        object.__setattr__(self, "image_size", checked_size(self.image_size))
        if self.shapes is not None:
            object.__setattr__(self, "shapes", [*checked_shapes(self.shapes)])
        check_channels(self.channels)
        minima = {"num_views": 1, "batch_size": 1, "num_workers": 0, "samples_per_shard": 1}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        if self.compute_dtype not in ("float32", "bfloat16"):
            raise ValueError(f"compute_dtype={self.compute_dtype!r} must be 'float32' or 'bfloat16'")

    def arguments(self) -> dict[str, Any]:
        """The options that decide the content of the set, as JSON types."""
        augmentation = vars(self.augmentation) if self.num_views > 1 else None
        without = ["num_workers", "overwrite", *([] if self.shapes is None else ["image_size"])]
        for name in ("compute_dtype", "shapes", "channels"):
            if getattr(self, name) == getattr(Encoding, name):  # as in sets older than the option
                without.append(name)
        chosen = {name: value for name, value in vars(self).items() if name not in without}
        return {**chosen, "augmentation": augmentation}

    def samples(self, data: ShardSet, encode: Encoder, start: int) -> Iterator[Sample]:
        """Make the new samples from number `start` on; earlier batches are neither decoded nor encoded."""
        first, within = divmod(start, data.num_samples)
        for view in range(first, self.num_views):
            yield from self._view(data, encode, view, within if view == first else 0)

    def stream(self, data: ShardSet, view: int) -> StreamedBatches:
        """The batches of a view."""
        collate = Collate(self.image_size, self.augmentation if view else None, self.seed)
        plan = EpochPlan(self.batch_size, train=False)
        return StreamedBatches(data, collate, plan, Decoder(channels=self.channels))

    def sizes(self, data: ShardSet, counts: Sequence[int]) -> list[str]:
        """Sizes for the index, for shards with these counts of samples; empty if all are `image_size`."""
        if self.shapes is None:
            return ["" for _ in counts]
        stream = self.stream(data, 0)
        widths = [height_width(stream.size_of(bucket))[::-1] for bucket in range(len(data.buckets))]
        view = [widths[bucket] for bucket, number in stream.batches() for _ in range(number)]
        sizes = chain.from_iterable(view for _ in range(self.num_views))
        return [size_text(islice(sizes, count)) for count in counts]

    def _view(self, data: ShardSet, encode: Encoder, view: int, skipped: int) -> Iterator[Sample]:
        """The samples of a view after the first `skipped`; the first batch is encoded in full."""
        stream, taken = self.stream(data, view), [0] * len(data.buckets)
        for bucket, number in stream.batches():
            if skipped < number:
                break
            taken[bucket], skipped = taken[bucket] + number, skipped - number
        stream.start_at(view, taken)
        return islice(self._encoded(stream, encode, view), skipped, None)

    def _encoded(self, stream: StreamedBatches, encode: Encoder, view: int) -> Iterator[Sample]:
        for batch in DataLoader(stream, batch_size=None, num_workers=self.num_workers):
            with torch.inference_mode(), frozen_networks_in(getattr(torch, self.compute_dtype)):
                encoded = list(encode(batch))
            for i, (key, files) in enumerate(zip(batch["key"], encoded, strict=True)):
                if "label" in batch:
                    files["cls"] = str(int(batch["label"][i])).encode()
                if "text" in batch:
                    files["txt"] = batch["text"][i].encode()
                yield Sample(f"{key}_v{view}", files)


def write_encoded(
    src: str | list[str],
    dst: Path | str,
    encode: Encoder,
    encoding: Encoding,
    *,
    writer: str,
    fields: Sequence[str],
    made_by: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    needs: Sequence[str] = ("image",),
) -> ShardIndex:
    """Encode the pictures of a set in views and write the result, with label and text, as a new set.

    Processes started by torchrun or srun share the work, see `WriterRank`; the set does not depend on their number.
    `encode` makes the new fields from the fields that the source `needs`. `made_by` identifies the models behind it, as
    JSON types by role; with `options` it is part of the arguments that decide the content.
    """
    indices = load_indices(src)
    for name in needs:
        if name not in indices[0].fields:
            raise ShardError(f"{indices[0].where} holds {list(indices[0].fields)}, but no {name}s to encode")
    source = [index.digest() for index in indices]
    makers = {role: by_all_weights(record) for role, record in made_by.items()}
    arguments = {"writer": writer, "source": source, **makers, **options, **encoding.arguments()}
    folder, process = Path(dst).expanduser(), WriterRank(*launched())
    ready = process.start_set(folder, arguments, encoding.overwrite)
    if ready is not None:
        return ready
    data = ShardSet(indices, shapes=encoding.shapes)
    counts = shard_sizes(data.num_samples * encoding.num_views, encoding.samples_per_shard)
    mine = process.share(len(counts))
    found = (complete_shard(folder / shard_name(number), counts[number]) for number in mine)
    own = [shard for shard in takewhile(bool, found) if shard is not None]  # from an interrupted run
    first = mine.start + len(own)
    done, most = (sum(counts[mine.start : stop]) for stop in (first, mine.stop))
    with tqdm(total=most, initial=done, desc=writer, unit="sample", disable=process.rank > 0) as bar:
        samples = _counted(encoding.samples(data, encode, sum(counts[:first])), bar)
        for number in range(first, mine.stop):
            own.append(write_shard(folder / shard_name(number), islice(samples, counts[number])))
    shards = process.gather(folder, counts, own)
    if shards is None:
        return process.finished_set(folder)
    provenance = {
        **made_by,
        "compute_dtype": encoding.compute_dtype,
        "images": [dict(index.provenance) for index in indices],
    }
    contents = (*fields, *(name for name in indices[0].fields if name in ("label", "text")))
    sized = zip(shards, encoding.sizes(data, counts), strict=True)
    shards = [replace(shard, sizes=sizes) for shard, sizes in sized]
    size = encoding.image_size if encoding.shapes is None else None
    index = ShardIndex(folder, contents, tuple(shards), indices[0].classes, size, arguments, provenance)
    if index.num_samples != sum(counts):
        raise ShardError(f"{index.num_samples} {writer} were written instead of {sum(counts)}")
    return write_index(index)


def _counted(samples: Iterator[Sample], bar: tqdm[Any]) -> Iterator[Sample]:
    for sample in samples:
        bar.update()
        yield sample


def require_identity(option: str, identity: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Check that a model's identity has its required entries: non-empty texts or positive whole numbers."""
    for name, kind in types.items():
        value = identity.get(name)
        if not isinstance(value, kind) or not value > kind():
            expected = "a text" if kind is str else "a positive whole number"
            raise ValueError(f"{option}={dict(identity)} must have {name!r}, {expected}")


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """Serialise an array as the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()
