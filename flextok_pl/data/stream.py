"""Deliver batches, read from shards on the fly or held in memory.

The order of a training epoch is a pure function of (seed, epoch, lanes) and known without reading. Shards are permuted,
the row of their samples is cut into lanes and groups (see `order`), and groups are permuted. Evaluation keeps the
stored order. Batch i of a rank comes from worker i modulo their number, the order in which the loader asks them. Each
bucket has its own sequence, see `buckets`; all ranks take batches of the same bucket at the same step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import accumulate, islice, pairwise, starmap
from typing import cast

import numpy as np
import torch
from torch.utils.data import IterableDataset, get_worker_info

from flextok_pl.contracts import Batch, ImageSize
from flextok_pl.data.buckets import Bucket, Shape, buckets_of, interleaved, uniform
from flextok_pl.data.order import Lanes, Mixture, Row, eval_samples, rank_share, train_steps
from flextok_pl.data.samples import STACKED, Collate, Decoded, Decoder, in_batch, stacked
from flextok_pl.data.shards.index import ShardError, ShardIndex
from flextok_pl.data.shards.open_shards import OpenShards, Shard
from flextok_pl.data.transforms import sample_generator

Group = list[tuple[int, int]]
"""Samples that are read together, as (shard, number in it)."""

Key = tuple[int, int, int]
"""A bucket, a lane, and a group in the lane."""

Places = tuple[int, Sequence[int]]
"""A bucket, and a batch of it: positions in its sequence, or numbers of samples in the set."""

MAX_OPEN = 100
"""Approximate number of open shards of the current groups. As many of the next ones are opened ahead. With several
buckets as many stay open that other buckets may still need."""


class ShardSet:
    """One or several shard sets of one kind as one row of shards.

    With `weights` a training epoch takes these shares of the sets, otherwise all samples once. With `shapes` there is a
    bucket for each shape that has samples, otherwise one for all.
    """

    def __init__(
        self,
        indices: Sequence[ShardIndex],
        weights: Sequence[float] | None = None,
        shapes: Sequence[Shape] | None = None,
    ) -> None:
        self.indices, self.weights = list(indices), weights
        self.shards = [(index, number) for index in indices for number in range(len(index.shards))]
        self.counts = [index.shards[number].count for index, number in self.shards]
        edges = [0, *accumulate(len(index.shards) for index in indices)]
        self.parts = [range(edges[-1])] if weights is None else [range(*ends) for ends in pairwise(edges)]
        self.buckets = [Bucket(self.counts)] if shapes is None else buckets_of(self.shards, shapes)

    @property
    def num_samples(self) -> int:
        """N, samples in all sets."""
        return sum(self.counts)

    def mixtures(self) -> list[Mixture]:
        """The part of each set in an epoch, for each bucket; together they are as long as the set."""
        total = self.num_samples
        sizes = [index.num_samples for index in self.indices]
        whole = Mixture.whole(total) if self.weights is None else Mixture.weighted(sizes, self.weights, total)
        return whole.split([[sum(bucket.counts[i] for i in part) for part in self.parts] for bucket in self.buckets])

    def chosen(self, limit: int | None) -> list[Sequence[int]]:
        """The samples of each bucket to evaluate, as numbers in the set; see `eval_samples`."""
        chosen = eval_samples(self.num_samples, limit)
        if len(self.buckets) == 1:
            return [chosen]
        numbers = np.asarray(chosen)
        of = np.concatenate(self.buckets[0].choice)[numbers]  # their shapes
        return [numbers[of == bucket.number].tolist() for bucket in self.buckets]


@dataclass(frozen=True)
class EpochPlan:
    """How a process reads a data set: in shuffled epochs, or in an evaluation that sees every sample once."""

    batch_size: int
    train: bool
    rank: int = 0
    world_size: int = 1
    seed: int = 0  # seed of the order
    drop_last: bool = True  # for training, see `train_steps`
    limit: int | None = None  # for evaluation, see `eval_samples`
    lanes: int = 1  # for training, see `Lanes`

    @property
    def together(self) -> int:
        """Samples of a training step, over all ranks."""
        return self.batch_size * self.world_size


class EpochStream(IterableDataset[Batch]):
    """Base of the two datasets: batches for one reader, in an epoch that the main process sets."""

    def __init__(self, data: ShardSet, collate: Collate, plan: EpochPlan, decoder: Decoder | None = None) -> None:
        super().__init__()
        self.data, self.collate, self.plan, self.decoder = data, collate, plan, decoder or Decoder()
        self.mixtures = data.mixtures()
        chosen = [] if plan.train else data.chosen(plan.limit)
        self.shares = [rank_share(each, plan.rank, plan.world_size) for each in chosen]  # for evaluation, per bucket
        self._start = torch.zeros(1 + len(data.buckets), dtype=torch.int64)
        self._start.share_memory_()  # type: ignore[no-untyped-call]

    def start_at(self, epoch: int, taken: Sequence[int] | int = 0) -> None:
        """Choose the epoch of the next pass and the number of samples to skip; running workers see it too.

        `taken` has the samples of each bucket, or one number: of the sequence of all ranks in training, of this rank's
        share in evaluation.
        """
        self._start.copy_(torch.tensor([epoch, *self._per_bucket(taken)]))

    def batches_left(self, taken: Sequence[int] | int) -> int:
        """Batches of this rank in an epoch after the samples that `start_at` skips."""
        return sum(map(len, self._starts(self._per_bucket(taken))))

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return self.batches_left(0)

    def steps(self, epoch: int, taken: Sequence[int] | int) -> Iterator[tuple[int, int]]:
        """Bucket of each remaining batch, and the position of its first sample in it."""
        plan = self.plan
        lengths = [mixture.length for mixture in self.mixtures] if plan.train else [*map(len, self.shares)]
        names = [bucket.name for bucket in self.data.buckets]

        def draw(bucket: int, start: int) -> float:
            mixes = plan.train and len(names) > 1
            return uniform(f"{plan.seed}/{epoch}/{names[bucket]}/{start}") if mixes else 0.0

        return interleaved(self._starts(self._per_bucket(taken)), lengths, plan.together, draw)

    def batches(self) -> Iterator[tuple[int, int]]:
        """Bucket and number of samples of each batch of an evaluation."""
        assert not self.plan.train
        for bucket, start in self.steps(0, 0):
            yield bucket, min(self.plan.batch_size, len(self.shares[bucket]) - start)

    def _per_bucket(self, taken: Sequence[int] | int) -> list[int]:
        return [taken] * len(self.data.buckets) if isinstance(taken, int) else [*taken]

    def _starts(self, taken: Sequence[int]) -> list[range]:
        """Positions in the sequence of each bucket at which batches begin."""
        plan = self.plan
        if not plan.train:
            return [range(n, len(share), plan.batch_size) for n, share in zip(taken, self.shares, strict=True)]
        sizes = (plan.batch_size, plan.world_size, plan.drop_last)
        return [train_steps(each.length, *sizes, n) for n, each in zip(taken, self.mixtures, strict=True)]

    def size_of(self, bucket: int) -> ImageSize:
        """The crop of a bucket's pictures."""
        shape = self.data.buckets[bucket].shape
        return self.collate.image_size if shape is None else shape

    def next_pass(self) -> tuple[int, Iterator[Places]]:
        """The epoch, and the batches of this process and worker."""
        epoch, *taken = self._start.tolist()
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        plan, stops = self.plan, [starts.stop for starts in self._starts(taken)]

        def batch(bucket: int, start: int) -> Places:
            if not plan.train:
                return bucket, self.shares[bucket][start : start + plan.batch_size]
            stop, length = min(start + plan.together, stops[bucket]), self.mixtures[bucket].length
            return bucket, [place % length for place in range(start + plan.rank, stop, plan.world_size)]

        return epoch, starmap(batch, islice(self.steps(epoch, taken), worker, None, num_workers))


class _Groups:
    """The current group of each lane, with its shards and those of the next group open."""

    def __init__(self, shards: OpenShards, make: Callable[[Key], Group]) -> None:
        self.shards, self.make = shards, make
        # This group and the next one, of each lane of a bucket.
        self._held: dict[tuple[int, int], dict[Key, tuple[Group, dict[int, None]]]] = {}

    def __getitem__(self, key: Key) -> Group:
        bucket, lane, number = key
        held = self._held.get((bucket, lane), {})
        if next(iter(held), None) != key:
            following = (bucket, lane, number + 1)
            self._held[bucket, lane] = {k: held[k] if k in held else self._made(k) for k in (key, following)}
            for _, shards in self._held[bucket, lane].values():
                self.shards.prepare(shards)
            self.shards.keep(s for groups in self._held.values() for _, shards in groups.values() for s in shards)
        return self._held[bucket, lane][key][0]

    def _made(self, key: Key) -> tuple[Group, dict[int, None]]:
        """Make a group; returns also its shards, in the order in which it needs them."""
        group = self.make(key)
        return group, dict.fromkeys(shard for shard, _ in group)


class StreamedBatches(EpochStream):
    """Reads shards on the fly; for sets of any size.

    Memory holds one batch, and the places of the samples in the current shards. The next shards are fetched and opened
    in the background. In training, groups of about `shuffle_buffer` samples are permuted; below 2 there are no groups.
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
        total = data.num_samples
        most = max(1, MAX_OPEN * total // (len(data.shards) * plan.lanes))
        size = min(shuffle_buffer if self.shuffle else 1000, most)
        # The groups of all buckets, which advance together, are in the same shards.
        self.lanes = [Lanes(n, plan.lanes, max(1, size * n // total)) for n in (each.length for each in self.mixtures)]

    def __iter__(self) -> Iterator[Batch]:
        epoch, batches = self.next_pass()
        with OpenShards(self.data.shards, MAX_OPEN if len(self.lanes) > 1 else 0) as shards:
            read = self._train(shards, epoch, batches) if self.plan.train else self._evaluate(shards, batches)
            for bucket, samples in read:
                yield self.collate(samples, epoch, self.size_of(bucket))

    def _train(self, shards: OpenShards, epoch: int, batches: Iterator[Places]) -> Iterator[tuple[int, list[Decoded]]]:
        rows: dict[Key, Row] = {}
        groups = _Groups(shards, lambda key: self._train_group(epoch, key, rows))
        for bucket, places in batches:
            found = [self.lanes[bucket].place(place) for place in places]
            yield bucket, [self._sample(groups, (bucket, *group), number) for group, number in found]

    def _evaluate(self, shards: OpenShards, batches: Iterator[Places]) -> Iterator[tuple[int, list[Decoded]]]:
        counts = self.data.counts
        row = Row(range(len(counts)), counts)
        found = [(bucket, [row.find(number) for number in numbers]) for bucket, numbers in batches]
        shards_of = [
            sorted({s for b, batch in found if b == bucket for s, _ in batch})
            for bucket in range(len(self.data.buckets))
        ]
        turns = [{shard: number for number, shard in enumerate(needed)} for needed in shards_of]

        def whole_shard(key: Key) -> Group:
            bucket, _, turn = key
            return [(shard, i) for shard in shards_of[bucket][turn : turn + 1] for i in range(counts[shard])]

        groups = _Groups(shards, whole_shard)
        for bucket, batch in found:
            yield bucket, [self._sample(groups, (bucket, 0, turns[bucket][shard]), n) for shard, n in batch]

    def _sample(self, groups: _Groups, key: Key, number: int) -> Decoded:
        """Read a sample of a group; if it is skipped, the next one."""
        group, size = groups[key], self.size_of(key[0])
        for place in range(number, number + len(group)):
            shard, sample = group[place % len(group)]
            decoded = self.decoder(self.data.shards[shard][0], groups.shards[shard].read(sample), size)
            if decoded is not None:
                return decoded
        where = self.data.shards[group[number][0]][0].where
        raise ShardError(f"all of {len(group)} samples read together are broken, in {where}; write the set again")

    def _train_group(self, epoch: int, key: Key, rows: dict[Key, Row]) -> Group:
        """The samples of a group, in the order of the sequence.

        `rows` caches the ordered shards of each bucket, part of the data and pass over it.
        """
        number, *place = key
        low, high = self.lanes[number].span(*place)
        bucket = self.data.buckets[number]
        group: Group = []
        for part, turn, begin, end in self.mixtures[number].pieces(epoch, low, high):
            if (number, part, turn) not in rows:
                shards = self.data.parts[part]
                generator = sample_generator(self.plan.seed, turn, f"shards {part}")  # the same for all buckets
                order = [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]
                rows[number, part, turn] = Row(order, bucket.counts)
            for shard, *span in rows[number, part, turn].spans(begin, end):
                group += [(shard, sample) for sample in bucket.numbers(shard, *span)]
        if not self.shuffle:
            return group
        generator = sample_generator(self.plan.seed, epoch, f"group {low}{bucket.name}")
        return [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]


class CachedBatches(EpochStream):
    """Holds the decoded samples in memory, and permutes all of them in every training epoch; for small sets.

    The memory is filled once, in the main process, and shared with the workers. A sample that the decoder skips is
    replaced by the one before it in its bucket.
    """

    def __init__(self, data: ShardSet, collate: Collate, plan: EpochPlan, decoder: Decoder | None = None) -> None:
        super().__init__(data, collate, plan, decoder)
        self.cache = self._decoded()
        # (N, 2C, h, w), (N, F, h', w'), (N, K); their shapes differ between buckets
        names = [name for name in STACKED if name in self.cache[0] and len(data.buckets) == 1]
        self.tensors = {name: stacked(self.cache, name) for name in names}
        for sample in self.cache:
            for name in self.tensors:
                sample.pop(name, None)  # one object may also replace others

    def __iter__(self) -> Iterator[Batch]:
        epoch, batches = self.next_pass()
        everything = range(len(self.cache))
        orders = [self._order(i, epoch) if self.plan.train else everything for i in range(len(self.data.buckets))]
        for bucket, places in batches:
            chosen = [orders[bucket][place] for place in places]
            batch = self.collate([self.cache[i] for i in chosen], epoch, self.size_of(bucket))
            arrays = {name: in_batch(tensor[chosen]) for name, tensor in self.tensors.items()}
            yield cast(Batch, {**batch, **arrays})

    def _decoded(self) -> list[Decoded]:
        found: dict[int, Decoded] = {}
        for i, (index, number) in enumerate(self.data.shards):
            with closing(Shard(index, number)) as shard:
                for n in range(len(self.data.buckets)):
                    for place, sample in self._numbers(n, range(i, i + 1)):
                        decoded = self.decoder(index, shard.read(sample), self.size_of(n))
                        if decoded is not None:
                            found[place] = decoded
        for n in range(len(self.data.buckets)):
            places = [place for place, _ in self._numbers(n, range(len(self.data.shards)))]
            kept = next((found[place] for place in places if place in found), None)  # replaces those before it
            if kept is None:
                raise ShardError(f"{self.data.indices[0].where}: all samples are broken")
            for place in places:
                kept = found.setdefault(place, kept)
        return [found[place] for place in range(len(found))]

    def _numbers(self, bucket: int, shards: range) -> list[tuple[int, int]]:
        """The samples of a bucket in some shards, as numbers in the set and in their shard."""
        first, result = sum(self.data.counts[: shards.start]), []
        for shard in shards:
            held = self.data.buckets[bucket]
            result += [(first + sample, sample) for sample in held.numbers(shard, 0, held.counts[shard])]
            first += self.data.counts[shard]
        return result

    def _order(self, bucket: int, epoch: int) -> list[int]:
        """The sequence of an epoch in a bucket."""
        mixture, name = self.mixtures[bucket], self.data.buckets[bucket].name
        samples: list[list[int]] = [[] for _ in self.data.parts]  # of each part, in order
        for part, number, begin, end in mixture.pieces(epoch, 0, mixture.length):
            generator = sample_generator(self.plan.seed, number, f"samples{part or ''}{name}")
            numbers = self._numbers(bucket, self.data.parts[part])
            permutation = torch.randperm(len(numbers), generator=generator)[begin:end].tolist()
            samples[part] += [numbers[i][0] for i in permutation]
        before = torch.stack(mixture.cut(torch.arange(mixture.length + 1)))  # (parts, samples + 1)
        turns = before.diff(dim=1).argmax(dim=0).tolist()  # the part at each position of the row
        parts = [iter(part) for part in samples]
        return [next(parts[part]) for part in turns]
