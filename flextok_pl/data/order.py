"""Which samples go where: plans that follow from the index alone, so that no sample is read to know them.

The samples of an epoch form one row, which is cut into one equal piece per rank and each piece into whole batches per
worker. So a set with fewer shards than readers is split inside its shards, and every rank has as many batches as the
others. Batch i of a rank comes from worker i modulo their number, which is how the loader asks them; so a pass can go
on after batch i.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import Tensor

IntT = TypeVar("IntT", int, Tensor)


@dataclass(frozen=True)
class Reader:
    """One of the processes that share a data set.

    Args:
        rank: of the training process.
        world_size: number of training processes.
        worker: of the loader's worker within the rank.
        num_workers: workers per rank.
    """

    rank: int = 0
    world_size: int = 1
    worker: int = 0
    num_workers: int = 1


def rank_share(num_samples: int, batch_size: int, drop_last: bool, world_size: int) -> int:
    """Samples of one rank in a training epoch.

    Args:
        num_samples: N, of the whole set.
        batch_size: samples per batch and rank.
        drop_last: leave out what does not fill a batch on every rank; else the last batch is smaller, and where N is no
            multiple of the ranks up to one sample per rank is added.
        world_size: number of ranks.
    """
    if drop_last:
        return num_samples // (world_size * batch_size) * batch_size
    return -(-num_samples // world_size)


def train_span(num_samples: int, batch_size: int, drop_last: bool, reader: Reader) -> tuple[int, int]:
    """The part of an epoch's row that a worker reads in training, as a half-open interval; see `rank_share`."""
    per_rank = rank_share(num_samples, batch_size, drop_last, reader.world_size)
    start, stop = _worker_span(per_rank, batch_size, reader)
    return reader.rank * per_rank + start, reader.rank * per_rank + stop


def _worker_span(num_samples: int, batch_size: int, reader: Reader) -> tuple[int, int]:
    """A worker's whole batches among the samples of its rank; the first workers have those that are left over."""
    each, more = divmod(-(-num_samples // batch_size), reader.num_workers)
    start = each * reader.worker + min(reader.worker, more)
    stop = start + each + (reader.worker < more)
    return min(start * batch_size, num_samples), min(stop * batch_size, num_samples)


def eval_positions(
    num_samples: int, limit: int | None, batch_size: int, reader: Reader, in_turns: bool = False
) -> Sequence[int]:
    """The samples that a worker evaluates: over all readers each one exactly once.

    Args:
        num_samples: N.
        limit: take only this many, evenly spread.
        batch_size: workers of a rank share its samples in whole batches.
        reader: who asks.
        in_turns: a rank's workers take every n-th batch each, not batches side by side.

    Returns:
        Ascending sample numbers.
    """
    chosen: Sequence[int] = range(num_samples)
    if limit is not None and limit < num_samples:
        chosen = [i * num_samples // limit for i in range(limit)]
    total = len(chosen)
    mine = chosen[total * reader.rank // reader.world_size : total * (reader.rank + 1) // reader.world_size]
    if in_turns:
        starts = range(0, len(mine), batch_size)[reader.worker :: reader.num_workers]
        return [position for start in starts for position in mine[start : start + batch_size]]
    start, stop = _worker_span(len(mine), batch_size, reader)
    return mine[start:stop]


def groups(start: int, stop: int, size: int) -> Iterator[tuple[int, int]]:
    """Cut an interval into parts of about equal length, none below `size` unless the whole is."""
    number = max(1, (stop - start) // size)
    return pairwise(start + (stop - start) * i // number for i in range(number + 1))


class Row:
    """Shards one after another.

    Args:
        order: numbers of the shards.
        counts: samples of each shard, by its number.
    """

    def __init__(self, order: Sequence[int], counts: Sequence[int]) -> None:
        self.order = order
        self.edges = [0, *accumulate(counts[shard] for shard in order)]

    def spans(self, start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """The shards of an interval: yields (shard, first sample, one past the last)."""
        place = bisect_right(self.edges, start) - 1
        while start < stop:
            low, high = self.edges[place : place + 2]
            end = min(stop, high)
            if start < end:
                yield self.order[place], start - low, end - low
            start, place = end, place + 1


@dataclass(frozen=True)
class Mixture:
    """What an epoch takes of each of several parts of the data.

    The samples of a part follow one another in passes, in each of which all of them come once. An epoch's row takes
    samples that follow one another of each part, and any stretch of the row has the parts in the epoch's shares: its
    number of samples of a part differs by less than the number of parts from the exact one.

    Args:
        sizes: samples of each part.
        takes: samples of each part in an epoch, at least 1.
        steps: samples of each part from the start of one epoch to that of the next.
    """

    sizes: tuple[int, ...]
    takes: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def whole(cls, size: int, length: int) -> Mixture:
        """One part, which every epoch begins anew: with `length` up to `size` no sample comes twice."""
        return cls((size,), (length,), (size,))

    @classmethod
    def weighted(cls, sizes: Sequence[int], weights: Sequence[float], length: int) -> Mixture:
        """Parts by weight in epochs of `length`: an epoch goes on in a part where the last one ended."""
        edges = [round(length * total / sum(weights)) for total in accumulate(weights, initial=0.0)]
        takes = tuple(stop - start for start, stop in pairwise(edges))
        if min(takes) < 1:
            raise ValueError(
                f"train_weights give {list(takes)} samples of the sets in an epoch of {length}; raise the weight "
                "of the set that gets none, or leave the set out"
            )
        return cls(tuple(sizes), takes, takes)

    def cut(self, position: IntT) -> list[IntT]:
        """How many samples of each part lie before a position of the row; grows with it by one of them at each step."""
        result = []
        total = sum(self.takes)
        for take in reversed(self.takes):
            before = position * (total - take) // max(total, 1)
            result.append(position - before)
            position, total = before, total - take
        return result[::-1]

    def pieces(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """What an interval of an epoch's row takes: yields (part, pass, its first sample, one past the last)."""
        for part, (low, high) in enumerate(zip(self.cut(start), self.cut(stop), strict=True)):
            first, last = epoch * self.steps[part] + low, epoch * self.steps[part] + high
            while first < last:
                number, offset = divmod(first, self.sizes[part])
                end = min(last - number * self.sizes[part], self.sizes[part])
                yield part, number, offset, end
                first = number * self.sizes[part] + end
