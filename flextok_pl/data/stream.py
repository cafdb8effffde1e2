"""The datasets that deliver batches: read from shards as they go, or held in memory.

The order of a training epoch is a pure function of (seed, epoch, lanes), and known without reading: shards are
permuted, the row of their samples is cut into lanes and groups as `order` describes, and groups are permuted.
Evaluation keeps the stored order. Batch i of a rank comes from worker i modulo their number, as the loader asks them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import cast

import torch
from torch.utils.data import IterableDataset, get_worker_info

from flextok_pl.contracts import Batch
from flextok_pl.data.order import Lanes, Mixture, Row, eval_share, train_steps
from flextok_pl.data.samples import STACKED, Collate, Decoded, Decoder, in_batch, stacked
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.open_shards import OpenShards, Shard
from flextok_pl.data.transforms import sample_generator

Group = list[tuple[int, int]]
"""Samples read together, as (shard, number in it)."""

Key = tuple[int, int]
"""A lane, and a group in it."""

MAX_OPEN = 100
"""Shards of the current groups that a reader holds open, about; it opens as many of the next ones ahead."""


class ShardSet:
    """One or several shard sets of one kind, seen as one row of shards.

    With `weights` a training epoch takes these shares of the sets, else all samples once.
    """

    def __init__(self, indices: Sequence[ShardIndex], weights: Sequence[float] | None = None) -> None:
        self.indices, self.weights = list(indices), weights
        self.shards = [(index, number) for index in indices for number in range(len(index.shards))]
        self.counts = [index.shards[number].count for index, number in self.shards]
        edges = [0, *accumulate(len(index.shards) for index in indices)]
        self.parts = [range(edges[-1])] if weights is None else [range(*ends) for ends in pairwise(edges)]

    @property
    def num_samples(self) -> int:
        """N, samples in all sets."""
        return sum(self.counts)

    def mixture(self, length: int) -> Mixture:
        """What epochs of `length` samples take of the parts."""
        if self.weights is None:
            return Mixture.whole(self.num_samples, length)
        return Mixture.weighted([index.num_samples for index in self.indices], self.weights, length)


@dataclass(frozen=True)
class EpochPlan:
    """How a process goes through a data set: shuffled epochs, or an evaluation that sees every sample once."""

    batch_size: int
    train: bool
    rank: int = 0
    world_size: int = 1
    seed: int = 0  # of the order
    drop_last: bool = True  # in training, see `train_steps`
    limit: int | None = None  # in evaluation, see `eval_share`
    lanes: int = 1  # in training, see `Lanes`

    @property
    def together(self) -> int:
        """Samples of a training step, over all ranks."""
        return self.batch_size * self.world_size


class EpochStream(IterableDataset[Batch]):
    """What the two datasets share: batches for one reader, in an epoch that the main process sets."""

    def __init__(self, data: ShardSet, collate: Collate, plan: EpochPlan, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.data, self.collate, self.plan, self.decoder = data, collate, plan, decoder or Decoder()
        self.mixture = data.mixture(data.num_samples)
        self._start = torch.zeros(2, dtype=torch.int64)
        self._start.share_memory_()  # type: ignore[no-untyped-call]

    def start_at(self, epoch: int, sample: int = 0) -> None:
        """Choose the epoch of the next pass, and how many samples it leaves out; workers that already run see it, too.

        The samples are those of the sequence of all ranks in training, of this rank's share in evaluation.
        """
        self._start.copy_(torch.tensor([epoch, sample]))

    def batches_left(self, sample: int) -> int:
        """Batches of this rank in an epoch after `sample` samples, as `start_at` counts them."""
        return len(self._starts(sample))

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return self.batches_left(0)

    def _starts(self, sample: int) -> range:
        plan, total = self.plan, self.data.num_samples
        if plan.train:
            return train_steps(total, plan.batch_size, plan.world_size, plan.drop_last, sample)
        return range(sample, len(eval_share(total, plan.limit, plan.rank, plan.world_size)), plan.batch_size)

    def next_pass(self) -> tuple[int, Iterator[Sequence[int]]]:
        """Epoch, and of each batch of this process and worker the samples: places in the sequence, or numbers."""
        epoch, sample = self._start.tolist()
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        plan, total, starts = self.plan, self.data.num_samples, self._starts(sample)
        share = range(total) if plan.train else eval_share(total, plan.limit, plan.rank, plan.world_size)

        def batch(start: int) -> Sequence[int]:
            if not plan.train:
                return share[start : start + plan.batch_size]
            stop = min(start + plan.together, starts.stop)
            return [place % total for place in range(start + plan.rank, stop, plan.world_size)]

        return epoch, map(batch, starts[worker::num_workers])


class _Groups:
    """The group that is read in each lane, with its shards and those of the next one open."""

    def __init__(self, shards: OpenShards, make: Callable[[Key], Group]) -> None:
        self.shards, self.make = shards, make
        self._held: dict[int, dict[Key, tuple[Group, dict[int, None]]]] = {}  # of each lane this group and the next

    def __getitem__(self, key: Key) -> Group:
        lane, number = key
        held = self._held.get(lane, {})
        if next(iter(held), None) != key:
            following = (lane, number + 1)
            self._held[lane] = {k: held[k] if k in held else self._made(k) for k in (key, following)}
            for _, shards in self._held[lane].values():
                self.shards.prepare(shards)
            self.shards.keep(s for groups in self._held.values() for _, shards in groups.values() for s in shards)
        return self._held[lane][key][0]

    def _made(self, key: Key) -> tuple[Group, dict[int, None]]:
        """A group, and its shards in the order in which it needs them."""
        group = self.make(key)
        return group, dict.fromkeys(shard for shard, _ in group)


class StreamedBatches(EpochStream):
    """Reads shards as it goes; for sets of any size.

    Memory holds one batch, and where the samples of the current shards lie; the next shards are brought and opened in
    the background. In training, groups of about `shuffle_buffer` samples are permuted; below 2 there are none.
    """

    def __init__(
        self,
        data: ShardSet,
        collate: Collate,
        plan: EpochPlan,
        decoder: Decoder | None = None,
        shuffle_buffer: int = 1000,
    ) -> None:
        super().__init__(data, collate, plan, decoder)
        self.shuffle = shuffle_buffer > 1
        most = max(1, MAX_OPEN * data.num_samples // (len(data.shards) * plan.lanes))
        self.lanes = Lanes(data.num_samples, plan.lanes, min(shuffle_buffer if self.shuffle else 1000, most))

    def __iter__(self) -> Iterator[Batch]:
        epoch, batches = self.next_pass()
        with OpenShards(self.data.shards) as shards:
            for samples in self._train(shards, epoch, batches) if self.plan.train else self._evaluate(shards, batches):
                yield self.collate(samples, epoch)

    def _train(self, shards: OpenShards, epoch: int, batches: Iterator[Sequence[int]]) -> Iterator[list[Decoded]]:
        rows: dict[Key, Row] = {}
        groups = _Groups(shards, lambda key: self._train_group(epoch, key, rows))
        for places in batches:
            yield [self._sample(groups, *self.lanes.place(place)) for place in places]

    def _evaluate(self, shards: OpenShards, batches: Iterator[Sequence[int]]) -> Iterator[list[Decoded]]:
        counts = self.data.counts
        row = Row(range(len(counts)), counts)
        found = [[row.find(number) for number in batch] for batch in batches]
        needed = sorted({shard for batch in found for shard, _ in batch})
        turn = {shard: (0, number) for number, shard in enumerate(needed)}

        def whole_shard(key: Key) -> Group:
            return [(shard, i) for shard in needed[key[1] : key[1] + 1] for i in range(counts[shard])]

        groups = _Groups(shards, whole_shard)
        for batch in found:
            yield [self._sample(groups, turn[shard], number) for shard, number in batch]

    def _sample(self, groups: _Groups, key: Key, number: int) -> Decoded:
        """A sample of a group; in place of one that is skipped the next one."""
        group = groups[key]
        for place in range(number, number + len(group)):
            shard, sample = group[place % len(group)]
            decoded = self.decoder(self.data.shards[shard][0], groups.shards[shard].read(sample))
            if decoded is not None:
                return decoded
        where = self.data.shards[group[number][0]][0].where
        raise ShardError(f"all of {len(group)} samples read together are broken, in {where}; write the set again")

    def _train_group(self, epoch: int, key: Key, rows: dict[Key, Row]) -> Group:
        """The samples of a group, in the order in which the sequence takes them.

        `rows` has the shards, in their order, of each part of the data and pass over it; missing ones are added.
        """
        low, high = self.lanes.span(*key)
        group: Group = []
        for part, number, begin, end in self.mixture.pieces(epoch, low, high):
            if (part, number) not in rows:
                shards = self.data.parts[part]
                generator = sample_generator(self.plan.seed, number, f"shards {part}")
                order = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
                rows[part, number] = Row(order, self.data.counts)
            for shard, *span in rows[part, number].spans(begin, end):
                group += [(shard, sample) for sample in range(*span)]
        if not self.shuffle:
            return group
        generator = sample_generator(self.plan.seed, epoch, f"group {low}")
        return [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]


class CachedBatches(EpochStream):
    """Holds the decoded samples in memory, and permutes all of them in every training epoch; for small sets.

    The memory is filled once, in the main process, and shared with the workers. In place of a sample that the decoder
    skips the one before it is kept.
    """

    def __init__(self, data: ShardSet, collate: Collate, plan: EpochPlan, decoder: Decoder | None = None) -> None:
        super().__init__(data, collate, plan, decoder)
        self.cache = self._decoded()
        # (N, 2C, h, w), (N, F, h', w'), (N, K)
        self.tensors = {name: stacked(self.cache, name) for name in STACKED if name in self.cache[0]}
        for sample in self.cache:
            for name in self.tensors:
                sample.pop(name, None)  # one object may stand in for others, too

    def __iter__(self) -> Iterator[Batch]:
        epoch, batches = self.next_pass()
        order = self._order(epoch) if self.plan.train else range(len(self.cache))
        for places in batches:
            chosen = [order[place] for place in places]
            batch = self.collate([self.cache[i] for i in chosen], epoch)
            arrays = {name: in_batch(tensor[chosen]) for name, tensor in self.tensors.items()}
            yield cast(Batch, {**batch, **arrays})

    def _decoded(self) -> list[Decoded]:
        decoded: list[Decoded | None] = []
        for (index, number), count in zip(self.data.shards, self.data.counts, strict=True):
            with closing(Shard(index, number)) as shard:
                decoded += [self.decoder(index, shard.read(sample)) for sample in range(count)]
        kept = next(filter(None, decoded), None)  # the first good one stands in for those before it
        if kept is None:
            raise ShardError(f"{self.data.indices[0].where}: all samples are broken")
        return [kept := sample or kept for sample in decoded]

    def _order(self, epoch: int) -> list[int]:
        """The sequence of an epoch."""
        total = len(self.cache)
        samples: list[list[int]] = [[] for _ in self.data.parts]  # of each part, in their order
        for part, number, begin, end in self.mixture.pieces(epoch, 0, total):
            generator = sample_generator(self.plan.seed, number, f"samples{part or ''}")
            first = sum(self.data.counts[: self.data.parts[part].start])
            permutation = torch.randperm(self.mixture.sizes[part], generator=generator) + first
            samples[part] += permutation[begin:end].tolist()
        before = torch.stack(self.mixture.cut(torch.arange(total + 1)))  # (parts, samples + 1)
        turns = before.diff(dim=1).argmax(dim=0).tolist()  # whose turn it is at each place of the row
        parts = [iter(part) for part in samples]
        return [next(parts[part]) for part in turns]
