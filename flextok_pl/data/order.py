"""Which samples go where: plans that follow from the index alone, so that no sample is read to know them.

The samples of a training epoch form one sequence, of which a step of all ranks takes the next ones. It does not depend
on the number of ranks and workers, so a run may go on with others.
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
    """The samples that are evaluated, ascending: all, or `limit` evenly spread."""
    if limit is None or limit >= num_samples:
        return range(num_samples)
    return [i * num_samples // limit for i in range(limit)]


def rank_share(samples: Sequence[int], rank: int, world_size: int) -> Sequence[int]:
    """What a rank evaluates of them: over all ranks each one exactly once."""
    total = len(samples)
    return samples[total * rank // world_size : total * (rank + 1) // world_size]


def train_steps(num_samples: int, batch_size: int, world_size: int, drop_last: bool, first: int = 0) -> range:
    """Where in the sequence each step of an epoch begins after its `first` samples; `stop` is where the last one ends.

    `drop_last` leaves out what does not fill a batch on every rank. Without it the last batch is smaller, and where the
    ranks do not divide what is left some take samples from the beginning of the sequence again.
    """
    together, left = batch_size * world_size, num_samples - first
    stop = first + (left // together * together if drop_last else -(-left // world_size) * world_size)
    return range(first, stop, together)


@dataclass(frozen=True)
class Lanes:
    """How a sequence goes through a row of samples.

    The row is cut into lanes of equal length, and the sequence takes from each in turn: with as many lanes as ranks, or
    a multiple, a rank stays in lanes of its own. A lane is cut into groups, whose samples come in another order.
    """

    num_samples: int  # of the row
    number: int  # of lanes
    group_size: int  # samples, about

    def place(self, position: int) -> tuple[tuple[int, int], int]:
        """The (lane, group in it) of a position of the sequence, and which of the group's samples it is."""
        offset, lane = divmod(position, self.number)
        _, size, count = self._lane(lane)
        group = ((offset + 1) * count - 1) // size
        return (lane, group), offset - size * group // count

    def span(self, lane: int, group: int) -> tuple[int, int]:
        """The part of the row that is a group, as a half-open interval; empty beyond the last group."""
        start, size, count = self._lane(lane)
        if group >= count:
            return 0, 0
        return start + size * group // count, start + size * (group + 1) // count

    def _lane(self, lane: int) -> tuple[int, int, int]:
        """Where a lane starts in the row, and its samples and groups."""
        each, more = divmod(self.num_samples, self.number)
        size = each + (lane < more)
        return lane * each + min(lane, more), size, max(1, size // self.group_size)


class Row:
    """Shards one after another, given by number, with the samples of each shard by its number."""

    def __init__(self, order: Sequence[int], counts: Sequence[int]) -> None:
        self.order = order
        self.edges = [0, *accumulate(counts[shard] for shard in order)]

    def find(self, position: int) -> tuple[int, int]:
        """The shard that a position of the row lies in, and the sample's number there."""
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
    """What an epoch takes of each of several parts of the data.

    The samples of a part follow one another in passes, in each of which all of them come once. An epoch's row takes
    samples that follow one another of each part, and any stretch of the row has the parts in the epoch's shares: its
    number of samples of a part differs by less than the number of parts from the exact one.
    """

    sizes: tuple[int, ...]  # samples of each part
    takes: tuple[int, ...]  # samples of each part in an epoch, at least 1
    steps: tuple[int, ...]  # samples of each part from the start of one epoch to that of the next

    @classmethod
    def whole(cls, size: int) -> Mixture:
        """One part, which every epoch takes once."""
        return cls((size,), (size,), (size,))

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

    @property
    def length(self) -> int:
        """Samples in an epoch."""
        return sum(self.takes)

    def split(self, sizes: Sequence[Sequence[int]]) -> list[Mixture]:
        """One mixture for each kind of samples, given how many of the kind are in each part.

        An epoch takes the kinds in the shares that they have in the parts.
        """
        takes = []
        for total, take, counts in zip(self.sizes, self.takes, zip(*sizes, strict=True), strict=True):
            edges = [take * before // total for before in accumulate(counts, initial=0)]
            takes.append([stop - start for start, stop in pairwise(edges)])
        kinds = zip(sizes, zip(*takes, strict=True), strict=True)
        return [Mixture(tuple(size), tuple(take), tuple(take)) for size, take in kinds]

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
