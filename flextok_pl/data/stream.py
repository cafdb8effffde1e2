"""The datasets that deliver batches: read from shards as they go, or held in memory.

The order of a training epoch is a pure function of (seed, epoch, rank, worker), and known without reading: shards are
permuted, the row of their samples is cut as `order` describes, and a reader permutes its piece in groups of about
`shuffle_buffer` samples. Evaluation cuts the samples in their stored order.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain, islice, pairwise
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info

from flextok_pl.contracts import Batch
from flextok_pl.data.index import ShardError, ShardIndex
from flextok_pl.data.order import Mixture, Reader, Row, eval_positions, groups, rank_share, train_span
from flextok_pl.data.samples import Collate, Decoded, Decoder, stacked
from flextok_pl.data.tars import OpenShards
from flextok_pl.data.transforms import sample_generator

Group = list[tuple[int, int]]
"""Samples to read, as (shard, number in it)."""

MAX_OPEN = 100
"""Shards of a group that a reader holds open; while it reads them, it opens as many of the next group."""


class ShardSet:
    """Several shard sets of one kind, seen as one row of shards.

    Args:
        indices: at least one set.
        weights: shares of the sets in a training epoch; None takes all samples once.
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

    def first_sample(self, part: int) -> int:
        """Number of the first sample of a part in the row of all shards."""
        return sum(self.counts[: self.parts[part].start])

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[ShardIndex, dict[str, Any]]]:
        """The raw samples start..stop of a shard."""
        with OpenShards(self.shards) as shards:
            shards.prepare([shard])
            for sample in range(start, stop):
                yield self.shards[shard][0], shards[shard].read(sample)


@dataclass(frozen=True)
class Plan:
    """How a process goes through a data set.

    Args:
        batch_size: samples per batch.
        train: shuffled epochs, or an evaluation that sees every sample once.
        rank: of this process.
        world_size: number of processes.
        seed: seed of the order.
        drop_last: in training, see `rank_share`.
        limit: in evaluation, see `eval_positions`.
        in_turns: in evaluation, the loader delivers the stored order in the same batches with any number of workers;
            each of them then reads all shards of its rank.
    """

    batch_size: int
    train: bool
    rank: int = 0
    world_size: int = 1
    seed: int = 0
    drop_last: bool = True
    limit: int | None = None
    in_turns: bool = False


class EpochStream(IterableDataset[Batch]):
    """What the two datasets share: batches for one reader, in an epoch that the main process sets.

    Args:
        data: the shards.
        collate: makes batches.
        plan: who reads what.
    """

    def __init__(self, data: ShardSet, collate: Collate, plan: Plan) -> None:
        super().__init__()
        self.data, self.collate, self.plan = data, collate, plan
        share = rank_share(data.num_samples, plan.batch_size, plan.drop_last, plan.world_size)
        self.mixture = data.mixture(share * plan.world_size)
        self._start = torch.zeros(2, dtype=torch.int64)
        self._start.share_memory_()  # type: ignore[no-untyped-call]

    def start_at(self, epoch: int, batch: int = 0) -> None:
        """Choose where the next pass starts; workers that already run see it, too.

        Args:
            epoch: number of the pass over the data.
            batch: leave out this many of the rank's batches.
        """
        self._start.copy_(torch.tensor([epoch, batch]))

    def __len__(self) -> int:
        """Batches of this rank in one epoch."""
        return -(-self._share(Reader(self.plan.rank, self.plan.world_size)) // self.plan.batch_size)

    def _share(self, reader: Reader) -> int:
        plan = self.plan
        if plan.train:
            start, stop = train_span(self.data.num_samples, plan.batch_size, plan.drop_last, reader)
            return stop - start
        return len(self.eval_share(reader))

    def eval_share(self, reader: Reader) -> Sequence[int]:
        """The samples that a reader evaluates, see `eval_positions`."""
        plan = self.plan
        return eval_positions(self.data.num_samples, plan.limit, plan.batch_size, reader, plan.in_turns)

    def next_pass(self) -> tuple[int, Reader, int]:
        """Epoch, what this process and worker reads of it, and how many of its batches to leave out."""
        epoch, batch = self._start.tolist()
        info = get_worker_info()
        worker, num_workers = (0, 1) if info is None else (info.id, info.num_workers)
        worker = (worker + batch) % num_workers  # the loader begins with the worker whose turn it is
        done = batch // num_workers + (worker < batch % num_workers)
        return epoch, Reader(self.plan.rank, self.plan.world_size, worker, num_workers), done


class StreamedBatches(EpochStream):
    """Reads shards as it goes; for sets of any size.

    Memory holds one batch, and where the samples of the current shards lie; the next shards are brought and opened in
    the background.

    Args:
        data: the shards.
        collate: makes batches.
        plan: who reads what.
        shuffle_buffer: samples of a group that is permuted in training; below 2 there is no group.
        decoder: of the samples.
    """

    def __init__(
        self,
        data: ShardSet,
        collate: Collate,
        plan: Plan,
        shuffle_buffer: int = 1000,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__(data, collate, plan)
        self.shuffle_buffer = shuffle_buffer
        self.decoder = decoder or Decoder()

    def __iter__(self) -> Iterator[Batch]:
        epoch, reader, done = self.next_pass()
        first = done * self.plan.batch_size
        plan = self._train(epoch, reader, first) if self.plan.train else self._evaluate(reader, first)
        samples = self._samples(plan)
        while batch := list(islice(samples, self.plan.batch_size)):
            yield self.collate(batch, epoch)

    def _samples(self, plan: Iterator[tuple[Group, int]]) -> Iterator[Decoded]:
        nothing: tuple[Group, int] = ([], 0)
        with OpenShards(self.data.shards) as shards:
            for (group, first), (upcoming, _) in pairwise(chain(plan, [nothing])):
                needed = dict.fromkeys(shard for shard, _ in upcoming)
                shards.prepare(dict.fromkeys(shard for shard, _ in group))
                shards.prepare(needed)
                for number in range(first, len(group)):
                    yield self._sample(shards, group, number)
                shards.keep(needed)

    def _sample(self, shards: OpenShards, group: Group, number: int) -> Decoded:
        """A sample of a group; in place of one that is skipped the next one."""
        for place in range(number, number + len(group)):
            shard, sample = group[place % len(group)]
            decoded = self.decoder(self.data.shards[shard][0], shards[shard].read(sample))
            if decoded is not None:
                return decoded
        where = self.data.shards[group[number][0]][0].where
        raise ShardError(f"all of {len(group)} samples read together are broken, in {where}; write the set again")

    def _train(self, epoch: int, reader: Reader, first: int) -> Iterator[tuple[Group, int]]:
        """Groups of samples, permuted, and where to begin in each; those before sample `first` are left out."""
        plan, data, mixture = self.plan, self.data, self.mixture
        rows: dict[int, tuple[int, Row]] = {}  # of each part the current pass
        shuffle = self.shuffle_buffer > 1
        size = min(self.shuffle_buffer if shuffle else 1000, max(1, MAX_OPEN * data.num_samples // len(data.shards)))
        start, stop = train_span(data.num_samples, plan.batch_size, plan.drop_last, reader)
        for low, high in groups(start, stop, size):
            if high <= start + first:
                continue
            group: Group = []
            for part, number, begin, end in mixture.pieces(epoch, low, high):
                if part not in rows or rows[part][0] != number:
                    rows[part] = number, Row(self._shard_order(part, number), data.counts)
                for shard, *span in rows[part][1].spans(begin, end):
                    group += [(shard, sample) for sample in range(*span)]
            if shuffle:
                generator = sample_generator(plan.seed, epoch, f"group {low}")
                group = [group[i] for i in torch.randperm(len(group), generator=generator).tolist()]
            yield group, max(0, start + first - low)

    def _shard_order(self, part: int, number: int) -> list[int]:
        shards = self.data.parts[part]
        generator = sample_generator(self.plan.seed, number, f"shards {part}")
        return [shards[i] for i in torch.randperm(len(shards), generator=generator).tolist()]

    def _evaluate(self, reader: Reader, first: int) -> Iterator[tuple[Group, int]]:
        """The samples of one shard after another."""
        positions = self.eval_share(reader)[first:]
        row, done = Row(range(len(self.data.counts)), self.data.counts), 0
        for shard, low in zip(row.order, row.edges, strict=False):
            stop = bisect_left(positions, low + self.data.counts[shard])
            if done < stop:
                yield [(shard, position - low) for position in positions[done:stop]], 0
            done = stop


class CachedBatches(EpochStream):
    """Holds the decoded samples in memory, and permutes all of them in every training epoch; for small sets.

    The memory is filled once, in the main process, and shared with the workers.

    Args:
        data: the shards.
        collate: makes batches.
        plan: who reads what.
        decoder: of the samples; in place of one that it skips the one before it is kept.
    """

    def __init__(self, data: ShardSet, collate: Collate, plan: Plan, decoder: Decoder | None = None) -> None:
        super().__init__(data, collate, plan)
        self.cache = self._decoded(decoder or Decoder())
        first = self.cache[0]
        self.latents = stacked(self.cache, "latent") if "latent" in first else None  # (N, 2C, h, w)
        self.tokens = stacked(self.cache, "tokens") if "tokens" in first else None  # (N, K)
        for sample in self.cache:
            sample.pop("latent", None)
            sample.pop("tokens", None)

    def __iter__(self) -> Iterator[Batch]:
        epoch, reader, done = self.next_pass()
        order, size = self._order(epoch, reader), self.plan.batch_size
        for first in range(done * size, len(order), size):
            chosen = order[first : first + size]
            batch = self.collate([self.cache[i] for i in chosen], epoch)
            if self.latents is not None:
                batch["latent"] = self.latents[chosen].to(torch.float32)  # (B, 2C, h, w)
            if self.tokens is not None:
                batch["tokens"] = self.tokens[chosen]  # (B, K)
            yield batch

    def _decoded(self, decoder: Decoder) -> list[Decoded]:
        found: list[Decoded] = []
        missing = 0
        for shard, count in enumerate(self.data.counts):
            for sample in self.data.read(shard, 0, count):
                decoded = decoder(*sample)
                if decoded is not None:
                    found += [decoded] * (1 + missing)
                    missing = 0
                elif found:
                    found.append(found[-1])
                else:
                    missing += 1  # the first good one stands in for those before it
        if missing:
            raise ShardError(f"{self.data.indices[0].where}: all samples are broken")
        return found

    def _order(self, epoch: int, reader: Reader) -> Sequence[int]:
        plan = self.plan
        if not plan.train:
            return list(self.eval_share(reader))
        start, stop = train_span(len(self.cache), plan.batch_size, plan.drop_last, reader)
        samples: list[list[int]] = [[] for _ in self.data.parts]  # of each part, in their order
        for part, number, begin, end in self.mixture.pieces(epoch, start, stop):
            generator = sample_generator(plan.seed, number, f"samples{part or ''}")
            permutation = torch.randperm(self.mixture.sizes[part], generator=generator) + self.data.first_sample(part)
            samples[part] += permutation[begin:end].tolist()
        before = torch.stack(self.mixture.cut(torch.arange(start, stop + 1)))  # (parts, samples + 1)
        turns = before.diff(dim=1).argmax(dim=0).tolist()  # whose turn it is at each place of the row
        parts = [iter(part) for part in samples]
        return [next(parts[part]) for part in turns]
