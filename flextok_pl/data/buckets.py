"""Buckets: the samples of a set by the shape that their pictures come in, so that each batch has one shape.

A sample goes to the shape whose aspect ratio is nearest its own (in logarithms, so that 2:1 and 1:2 are as far from a
square), as in NovelAI's aspect-ratio bucketing (https://blog.novelai.net/novelai-improvements-on-stable-diffusion
-e10d38db82ac). Unlike there, sizes are known beforehand, and the order is planned and not filled up as samples come.
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
"""The largest shape has at most this many times the pixels of the smallest without a warning."""


def checked_shapes(shapes: Iterable[Sequence[int]]) -> tuple[Shape, ...]:
    """The option `shapes`; warns of areas that differ much, as steps then do in time and memory.

    Raises:
        ValueError: there are none, one is no size, or two have one aspect ratio.
    """
    found = tuple(height_width(checked_size(shape, "shapes")) for shape in shapes)
    if not found:
        raise ValueError("shapes=[] must name at least one [height, width], or be null for image_size only")
    ratios: dict[float, Shape] = {}
    for shape in found:
        other = ratios.setdefault(shape[1] / shape[0], shape)
        if other is not shape:
            raise ValueError(
                f"shapes: {name_of(other)} and {name_of(shape)} have one aspect ratio; leave one of them out"
            )
    smallest, largest = min(found, key=prod), max(found, key=prod)
    if prod(largest) > MOST_UNALIKE * prod(smallest):
        warnings.warn(
            f"shapes: {name_of(largest)} has {prod(largest) / prod(smallest):.1f} times the pixels of "
            f"{name_of(smallest)}: a batch takes as many times the memory and time; choose shapes of like areas",
            stacklevel=3,
        )
    return found


def name_of(shape: Shape) -> str:
    """A shape as messages and checkpoints have it: height x width."""
    return f"{shape[0]}x{shape[1]}"


@dataclass(frozen=True)
class Bucket:
    """The samples of one shape."""

    counts: Sequence[int]  # of each shard
    shape: Shape | None = None  # None for `image_size`, of all samples
    choice: Sequence[np.ndarray[Any, Any]] = ()  # of each shard (N,), the numbers of its samples' shapes
    number: int = 0  # of this shape

    @property
    def name(self) -> str:
        """Tells buckets apart in seeds and checkpoints; empty for all samples."""
        return "" if self.shape is None else name_of(self.shape)

    def numbers(self, shard: int, start: int, stop: int) -> Sequence[int]:
        """Where some samples of the bucket lie in a shard, given by what number of the bucket's there they are."""
        if self.shape is None:
            return range(start, stop)
        numbers: list[int] = np.flatnonzero(self.choice[shard] == self.number)[start:stop].tolist()
        return numbers


def buckets_of(shards: Sequence[tuple[ShardIndex, int]], shapes: Sequence[Shape]) -> list[Bucket]:
    """A bucket for each shape that samples go to.

    Raises:
        ShardError: an index does not hold the sizes, or latents were made in none of the shapes.
    """
    choice = [_choose(index, number, shapes) for index, number in shards]
    counts = np.array([np.bincount(each, minlength=len(shapes)) for each in choice])  # (shards, shapes)
    return [Bucket(counts[:, i].tolist(), shapes[i], choice, i) for i in range(len(shapes)) if counts[:, i].any()]


def _choose(index: ShardIndex, number: int, shapes: Sequence[Shape]) -> np.ndarray[Any, Any]:
    """(N,) uint16, the shape that each sample of a shard goes to."""
    shard, one = index.shards[number], index.image_size
    try:
        known = shard.sizes if shard.sizes or one is None else size_text([height_width(one)[::-1]]) + f"*{shard.count}"
        sizes = parse_sizes(known)  # (N, 2)
    except ValueError as error:
        raise ShardError(f"{index.where}: {error}; write the set again with overwrite") from error
    if len(sizes) != shard.count:
        raise ShardError(
            f"shapes={list(map(name_of, shapes))} need the size of each picture, and the index of {index.where} has "
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
                f"{index.where} was made from pictures of {without[0][1]}x{without[0][0]}, which shapes="
                f"{list(map(name_of, shapes))} lack; set shapes to those of the set, or write it again"
            )
    return nearest.astype(np.uint16)


def interleaved(
    starts: Sequence[Sequence[int]], lengths: Sequence[int], together: int, draw: Callable[[int, int], float]
) -> Iterator[tuple[int, int]]:
    """The batches of several buckets as one sequence, in which each bucket is spread evenly.

    A bucket of `lengths` samples has batches that start at some of them, in ascending order. A batch comes when as
    large a share of all buckets has come, more or less by less than the batch: `draw` gives how much of it for a bucket
    and a start, in [0, 1). So what follows some batches depends on nothing but how far each bucket is.

    Yields:
        bucket and start of each batch.
    """

    def timed(bucket: int) -> Iterator[tuple[float, int, int]]:
        for start in starts[bucket]:
            yield (start + together * draw(bucket, start)) / lengths[bucket], bucket, start

    return ((bucket, start) for _, bucket, start in heapq.merge(*map(timed, range(len(starts)))))


def uniform(text: str) -> float:
    """A number in [0, 1) from a text."""
    return key_hash(text, "batch") / 2**63
