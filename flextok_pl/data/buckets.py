"""Group the samples of a set by the shape of their pictures, so that each batch has one shape.

A sample goes to the shape whose aspect ratio is nearest its own (in logarithms, so that 2:1 and 1:2 are equally far
from a square), as in NovelAI's aspect-ratio bucketing
(https://blog.novelai.net/novelai-improvements-on-stable-diffusion-e10d38db82ac). Unlike there, sizes are known
beforehand, so the order is planned.
"""

from __future__ import annotations

import heapq
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from flextok_pl.contracts import checked_size, height_width
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.sizes import parse_sizes, size_text
from flextok_pl.keys import key_hash

Shape = tuple[int, int]
"""(H, W) in pixels."""

MOST_UNALIKE = 1.5
"""Largest ratio of the pixels of two shapes without a warning."""


def checked_shapes(shapes: Iterable[Sequence[int]]) -> tuple[Shape, ...]:
    """Check the option `shapes`; warns of very different areas, because steps then differ in time and memory.

    Raises:
        ValueError: there are no shapes, one is not a size, or two have the same aspect ratio.
    """
    found = tuple(height_width(checked_size(shape, "shapes")) for shape in shapes)
    if not found:
        raise ValueError("shapes=[] must name at least one [height, width], or be null for image_size only")
    ratios: dict[float, Shape] = {}
    for shape in found:
        other = ratios.setdefault(shape[1] / shape[0], shape)
        if other is not shape:
            raise ValueError(
                f"shapes: {name_of(other)} and {name_of(shape)} have the same aspect ratio; leave one of them out"
            )
    smallest, largest = min(found, key=prod), max(found, key=prod)
    if prod(largest) > MOST_UNALIKE * prod(smallest):
        warnings.warn(
            f"shapes: {name_of(largest)} has {prod(largest) / prod(smallest):.1f} times the pixels of "
            f"{name_of(smallest)}, and a batch takes as many times the memory and time; choose shapes of similar areas",
            stacklevel=3,
        )
    return found


def name_of(shape: Shape) -> str:
    """Name a shape in messages and checkpoints: height x width."""
    return f"{shape[0]}x{shape[1]}"


@dataclass(frozen=True)
class Bucket:
    """The samples of one shape."""

    counts: Sequence[int]  # of each shard
    shape: Shape | None = None  # None for `image_size`, with all samples
    choice: Sequence[np.ndarray[Any, Any]] = ()  # of each shard (N,), the number of each sample's shape
    number: int = 0  # number of this shape

    @property
    def name(self) -> str:
        """The bucket's name in seeds and checkpoints; empty for all samples."""
        return "" if self.shape is None else name_of(self.shape)

    def numbers(self, shard: int, start: int, stop: int) -> Sequence[int]:
        """Numbers in a shard of some of the bucket's samples, which are given by their number in the bucket there."""
        if self.shape is None:
            return range(start, stop)
        numbers: list[int] = np.flatnonzero(self.choice[shard] == self.number)[start:stop].tolist()
        return numbers


def buckets_of(shards: Sequence[tuple[ShardIndex, int]], shapes: Sequence[Shape]) -> list[Bucket]:
    """Make a bucket for each shape that has samples.

    Raises:
        ShardError: an index lacks the sizes, or latents were made in other shapes.
    """
    choice = [_choose(index, number, shapes) for index, number in shards]
    counts = np.array([np.bincount(each, minlength=len(shapes)) for each in choice])  # (shards, shapes)
    return [Bucket(counts[:, i].tolist(), shapes[i], choice, i) for i in range(len(shapes)) if counts[:, i].any()]


def _choose(index: ShardIndex, number: int, shapes: Sequence[Shape]) -> np.ndarray[Any, Any]:
    """The shape of each sample of a shard, (N,) uint16."""
    shard, one = index.shards[number], index.image_size
    try:
        known = shard.sizes if shard.sizes or one is None else size_text([height_width(one)[::-1]]) + f"*{shard.count}"
        sizes = parse_sizes(known)  # (N, 2)
    except ValueError as error:
        raise ShardError(f"{index.where}: {error}; write the set again with overwrite") from error
    if len(sizes) != shard.count:
        raise ShardError(
            f"shapes={list(map(name_of, shapes))} need the size of each picture, but the index of {index.where} has "
            f"{len(sizes)} of {shard.count} in {shard.name}; add them with: flextok data measure {index.where}"
        )
    targets = np.array(shapes)[:, ::-1]  # (shapes, 2), width and height
    if "image" in index.fields:
        wanted, given = (np.log(each[:, 0] / each[:, 1]) for each in (targets, sizes))  # (shapes,), (N,)
        nearest: np.ndarray[Any, Any] = np.abs(given[:, None] - wanted).argmin(axis=1)
    else:
        same = (sizes[:, None] == targets).all(axis=2)  # (N, shapes)
        nearest = same.argmax(axis=1)
        without = sizes[~same.any(axis=1)].tolist()
        if without:
            raise ShardError(
                f"{index.where} was made from pictures of {without[0][1]}x{without[0][0]}, which are not in shapes="
                f"{list(map(name_of, shapes))}; set shapes to those of the set, or write it again"
            )
    return nearest.astype(np.uint16)


def interleaved(
    starts: Sequence[Sequence[int]], lengths: Sequence[int], together: int, draw: Callable[[int, int], float]
) -> Iterator[tuple[int, int]]:
    """Merge the batches of several buckets into one sequence in which each bucket is spread evenly.

    A bucket of `lengths` samples has batches at the given starts, in ascending order. A batch comes when an equal share
    of all buckets has come, to within less than a batch. `draw` gives this offset in [0, 1) for a bucket and a start.
    So the rest of the sequence depends only on how far each bucket is.

    Yields:
        bucket and start of each batch.
    """

    def timed(bucket: int) -> Iterator[tuple[float, int, int]]:
        for start in starts[bucket]:
            yield (start + together * draw(bucket, start)) / lengths[bucket], bucket, start

    return ((bucket, start) for _, bucket, start in heapq.merge(*map(timed, range(len(starts)))))


def uniform(text: str) -> float:
    """Hash a text to a number in [0, 1)."""
    return key_hash(text, "batch") / 2**63
