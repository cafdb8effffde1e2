"""Plan which samples go where, from the index alone, without reading a sample.

The samples of a training epoch form one sequence, and a step of all ranks takes the next ones. The sequence does not
depend on the number of ranks and workers, so a run can resume with others.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import TypeVar

from torch import Tensor

IntT = TypeVar("IntT", int, Tensor)


def eval_samples(num_samples: int, limit: int | None) -> Sequence[int]:
    """The samples to evaluate, ascending: all, or `limit` evenly spread."""
    if limit is None or limit >= num_samples:
        return range(num_samples)
    return [i * num_samples // limit for i in range(limit)]


def rank_share(samples: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """A rank's share of the samples to evaluate; the ranks together cover each sample exactly once."""
    total = len(samples)
    return samples[total * rank // world_size : total * (rank + 1) // world_size]


def train_steps(num_samples: int, batch_size: int, world_size: int, drop_last: bool, first: int = 0) -> range:
    """First sample of each step of an epoch, after its `first` samples; `stop` is the end of the last step.

    `drop_last` leaves out samples that do not fill a batch on every rank. Otherwise the last batch is smaller, and if
    the ranks do not divide it, some take samples from the beginning of the sequence again.
    """
    together, left = batch_size * world_size, num_samples - first
    stop = first + (left // together * together if drop_last else -(-left // world_size) * world_size)
    return range(first, stop, together)


@dataclass(frozen=True)
class Lanes:
    """The order in which a sequence goes through a row of samples.

    The row is cut into lanes of equal length, and the sequence takes from each in turn. With as many lanes as ranks, or
    a multiple, a rank stays in its own lanes. A lane is cut into groups, and the samples of a group are permuted.
    """

    num_samples: int  # samples of the row
    number: int  # number of lanes
    group_size: int  # approximate samples of a group

    def place(self, position: int) -> tuple[tuple[int, int], int]:
        """The (lane, group in it) of a position of the sequence, and the sample's number in the group."""
        offset, lane = divmod(position, self.number)
        _, size, count = self._lane(lane)
        group = ((offset + 1) * count - 1) // size
        return (lane, group), offset - size * group // count

    def span(self, lane: int, group: int) -> tuple[int, int]:
        """A group's part of the row, as a half-open interval; empty beyond the last group."""
        start, size, count = self._lane(lane)
        if group >= count:
            return 0, 0
        return start + size * group // count, start + size * (group + 1) // count

    def _lane(self, lane: int) -> tuple[int, int, int]:
        """A lane's start in the row, and its numbers of samples and groups."""
        each, more = divmod(self.num_samples, self.number)
        size = each + (lane < more)
        return lane * each + min(lane, more), size, max(1, size // self.group_size)


class Row:
    """A row of shards, given by number, with the number of samples of each."""

    def __init__(self, order: Sequence[int], counts: Sequence[int]) -> None:
        self.order = order
        self.edges = [0, *accumulate(counts[shard] for shard in order)]

    def find(self, position: int) -> tuple[int, int]:
        """The shard at a position of the row, and the sample's number in it."""
        place = bisect_right(self.edges, position) - 1
        return self.order[place], position - self.edges[place]

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
    """How many samples an epoch takes from each of several parts of the data.

    A part is read in passes, and each pass has all samples once. An epoch's row takes consecutive samples of each part.
    Any stretch of the row has the parts in the epoch's shares: its number of samples of a part differs from the exact
    number by less than the number of parts.
    """

    sizes: tuple[int, ...]  # samples of each part
    takes: tuple[int, ...]  # samples of each part in an epoch, at least 1
    steps: tuple[int, ...]  # samples of each part from the start of one epoch to the start of the next

    @classmethod
    def whole(cls, size: int) -> Mixture:
        """A mixture of one part, which every epoch takes once."""
        return cls((size,), (size,), (size,))

    @classmethod
    def weighted(cls, sizes: Sequence[int], weights: Sequence[float], length: int) -> Mixture:
        """A mixture by weights, in epochs of `length`; an epoch continues each part where the last one ended."""
        edges = [round(length * total / sum(weights)) for total in accumulate(weights, initial=0.0)]
        takes = tuple(stop - start for start, stop in pairwise(edges))
        if min(takes) < 1:
            raise ValueError(
                f"train_weights give {list(takes)} samples of the sets in an epoch of {length}; raise the weight "
                "of the set that gets none, or leave the set out"
            )
        return cls(tuple(sizes), takes, takes)

    @property
    def length(self) -> int:
        """Samples in an epoch."""
        return sum(self.takes)

    def split(self, sizes: Sequence[Sequence[int]]) -> list[Mixture]:
        """One mixture for each kind of samples, from the number of samples of the kind in each part.

        An epoch takes the kinds in the shares that they have in the parts.
        """
        takes = []
        for total, take, counts in zip(self.sizes, self.takes, zip(*sizes, strict=True), strict=True):
            edges = [take * before // total for before in accumulate(counts, initial=0)]
            takes.append([stop - start for start, stop in pairwise(edges)])
        kinds = zip(sizes, zip(*takes, strict=True), strict=True)
        return [Mixture(tuple(size), tuple(take), tuple(take)) for size, take in kinds]

    def cut(self, position: IntT) -> list[IntT]:
        """Samples of each part before a position of the row; one of them grows by 1 with each position."""
        result = []
        total = sum(self.takes)
        for take in reversed(self.takes):
            before = position * (total - take) // max(total, 1)
            result.append(position - before)
            position, total = before, total - take
        return result[::-1]

    def pieces(self, epoch: int, start: int, stop: int) -> Iterator[tuple[int, int, int, int]]:
        """Resolve an interval of an epoch's row: yields (part, pass, its first sample, one past the last)."""
        for part, (low, high) in enumerate(zip(self.cut(start), self.cut(stop), strict=True)):
            first, last = epoch * self.steps[part] + low, epoch * self.steps[part] + high
            while first < last:
                number, offset = divmod(first, self.sizes[part])
                end = min(last - number * self.sizes[part], self.sizes[part])
                yield part, number, offset, end
                first = number * self.sizes[part] + end
