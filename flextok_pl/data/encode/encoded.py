"""The pictures of image shards, encoded once and written as a new set: what latents and tokens share.

All pictures follow one another once per view, in their stored order and cut into the same batches by any number of
workers. So a set is a function of its arguments, and an interrupted run goes on with the batch in which its first
missing shard begins.

Shapes in this file: B batch, S image side.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from flextok_pl.contracts import Batch
from flextok_pl.data.encode.team import Team
from flextok_pl.data.samples import Collate
from flextok_pl.data.shards.index import ShardError, ShardIndex, ShardInfo
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.writer import Sample, complete_shard, shard_name, shard_sizes, write_index, write_shard
from flextok_pl.data.stream import Plan, ShardSet, StreamedBatches
from flextok_pl.data.transforms import Augmentation

Encoder = Callable[[Batch], Iterable[dict[str, bytes]]]
"""A batch of B pictures -> for each the files of its new fields, by extension."""


@dataclass(frozen=True)
class Views:
    """How the pictures of a set are gone through: all of them once per view.

    View 0 of a picture is its centre crop, the further ones are training augmentations.

    Args:
        image_size: S.
        num_views: samples per picture.
        augmentation: of views 1, 2, ...
        seed: of the augmentations.
        batch_size: pictures per call of the encoder.
        num_workers: processes that decode pictures; the order does not depend on it.
        samples_per_shard: samples per tar file.

    Raises:
        ValueError: an option is out of range.
    """

    image_size: int
    num_views: int
    augmentation: Augmentation
    seed: int
    batch_size: int
    num_workers: int
    samples_per_shard: int

    def __post_init__(self) -> None:
        minima = {"image_size": 1, "num_views": 1, "batch_size": 1, "num_workers": 0, "samples_per_shard": 1}
        for name, least in minima.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")

    def arguments(self) -> dict[str, Any]:
        """What of these decides the content of the set, as JSON types."""
        augmentation = vars(self.augmentation) if self.num_views > 1 else None
        chosen = {name: value for name, value in vars(self).items() if name != "num_workers"}
        return {**chosen, "augmentation": augmentation}

    def samples(self, data: ShardSet, encode: Encoder, start: int) -> Iterator[Sample]:
        """The new samples from number `start` on; what lies in batches before it is neither decoded nor encoded."""
        first, within = divmod(start, data.num_samples)
        for view in range(first, self.num_views):
            skipped = within if view == first else 0
            done = skipped % self.batch_size
            yield from islice(self._view(data, encode, view, skipped - done), done, None)

    def _view(self, data: ShardSet, encode: Encoder, view: int, first: int) -> Iterator[Sample]:
        collate = Collate(self.image_size, self.augmentation if view else None, self.seed)
        stream = StreamedBatches(data, collate, Plan(self.batch_size, train=False))
        stream.start_at(view, first)
        for batch in DataLoader(stream, batch_size=None, num_workers=self.num_workers):
            with torch.inference_mode():
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
    views: Views,
    *,
    writer: str,
    fields: Sequence[str],
    made_by: Mapping[str, Mapping[str, Any]],
    options: Mapping[str, Any],
    needs: Sequence[str] = ("image",),
    overwrite: bool = False,
) -> ShardIndex:
    """Encode the pictures of a set in views and write the result, with label and text, as a new set.

    Processes that torchrun or srun has started share the work, see `Team`; the set does not depend on their number.

    Args:
        src: image shard set(s), as for `ShardDataModule`.
        dst: folder of the new set; a run that was interrupted there with equal arguments is gone on with.
        encode: makes the new fields.
        views: of the pictures, and their grouping into batches and shards.
        writer: name of what is written, such as `latents`.
        fields: the new fields.
        made_by: identity of the models behind `encode`, JSON types by role; part of arguments and provenance.
        options: further arguments that decide the content.
        needs: fields that the source must have.
        overwrite: replace a set that was made with other arguments.

    Returns:
        The index of the new set.

    Raises:
        ShardError: the source lacks a field, or the folder holds something else.
        OSError: the disk is full; the same command goes on once there is space.
    """
    indices = load_indices(src)
    for name in needs:
        if name not in indices[0].fields:
            raise ShardError(f"{indices[0].where} holds {list(indices[0].fields)}, no {name}s to encode")
    source = [index.digest() for index in indices]
    arguments = {"writer": writer, "source": source, **made_by, **options, **views.arguments()}
    folder = Path(dst)
    team = Team.of_environment()
    ready = team.start_set(folder, arguments, overwrite)
    if ready is not None:
        return ready
    data = ShardSet(indices)
    total = data.num_samples * views.num_views
    counts = shard_sizes(total, views.samples_per_shard)
    mine = team.share(len(counts))
    own = list(_leading(folder, mine, counts))
    first = mine.start + len(own)
    done, most = (sum(counts[mine.start : stop]) for stop in (first, mine.stop))
    with tqdm(total=most, initial=done, desc=writer, unit="sample", disable=team.rank > 0) as bar:
        samples = _counted(views.samples(data, encode, sum(counts[:first])), bar)
        for number in range(first, mine.stop):
            own.append(write_shard(folder / shard_name(number), islice(samples, counts[number])))
    shards = team.gather(folder, counts, own)
    if shards is None:
        return team.finished_set(folder)
    provenance = {**made_by, "images": [dict(index.provenance) for index in indices]}
    kept = (name for name in indices[0].fields if name in ("label", "text"))
    index = ShardIndex(
        folder, (*fields, *kept), tuple(shards), indices[0].classes, views.image_size, arguments, provenance
    )
    if index.num_samples != total:
        raise ShardError(f"{index.num_samples} {writer} were written instead of {total}")
    write_index(index)
    return index


def _leading(folder: Path, numbers: range, counts: Sequence[int]) -> Iterator[ShardInfo]:
    """The first of the shards with these numbers, as far as an interrupted run has left them complete."""
    for number in numbers:
        shard = complete_shard(folder / shard_name(number))
        if shard is None or shard.count != counts[number]:
            return
        yield shard


def require_identity(option: str, identity: Mapping[str, Any], types: Mapping[str, type]) -> None:
    """Check that a model's identity has what it must, non-empty texts or positive whole numbers.

    Raises:
        ValueError: it has not; names the option.
    """
    for name, kind in types.items():
        value = identity.get(name)
        if not isinstance(value, kind) or not value > kind():
            expected = "a text" if kind is str else "a positive whole number"
            raise ValueError(f"{option}={dict(identity)} must have {name!r}, {expected}")


def npy(array: np.ndarray[Any, Any]) -> bytes:
    """An array as the content of a `.npy` file."""
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _counted(samples: Iterator[Sample], bar: tqdm[Any]) -> Iterator[Sample]:
    for sample in samples:
        bar.update()
        yield sample
