"""Which samples go where, and the datasets that deliver them as batches.

The order of a training epoch is a pure function of (seed, epoch, rank, worker): shards are permuted, the resulting row
of samples is cut into one equal piece per rank and each piece into whole batches per worker, so a set with fewer
shards than readers is split inside its shards. Evaluation cuts the samples in their stored order. Batch i of a rank
comes from worker i modulo their number, which is how the loader asks them; so a pass can go on after batch i.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, TypeVar

import torch
import webdataset as wds
from torch.utils.data import IterableDataset, get_worker_info

from flextok_pl.contracts import Batch
from flextok_pl.data.index import ShardIndex
from flextok_pl.data.samples import Collate, Decoded, decode_sample, read_shard, stacked
from flextok_pl.data.transforms import sample_generator

T = TypeVar("T")


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


def train_span(num_samples: int, batch_size: int, drop_last: bool, reader: Reader) -> tuple[int, int]:
    """The part of the permuted row of samples that a worker reads in training.

    Args:
        num_samples: N, of the whole set.
        batch_size: samples per batch and rank.
        drop_last: leave out what does not fill a batch on every rank; else the last batch is smaller, and where N is no
            multiple of the ranks some take samples from the beginning of the row again.
        reader: who asks.

    Returns:
        Half-open interval; positions from N on mean the row from its beginning.
    """
    if drop_last:
        per_rank = num_samples // (reader.world_size * batch_size) * batch_size
    else:
        per_rank = -(-num_samples // reader.world_size)
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


class ShardSet:
    """Several shard sets of one kind, seen as one row of shards.

    Args:
        indices: at least one.
    """

    def __init__(self, indices: Sequence[ShardIndex]) -> None:
        self.indices = list(indices)
        self.shards = [(index, number) for index in indices for number in range(len(index.shards))]
        self.counts = [index.shards[number].count for index, number in self.shards]

    @property
    def num_samples(self) -> int:
        """N, samples in all sets."""
        return sum(self.counts)

    def spans(self, order: Sequence[int], start: int, stop: int) -> Iterator[tuple[int, int, int]]:
        """Cut the row of shards in the given order; yields (shard, first sample, one past the last)."""
        offset = 0
        while offset < stop:  # more than once around where ranks share samples again
            for shard in order:
                low, high = max(start - offset, 0), min(stop - offset, self.counts[shard])
                if low < high:
                    yield shard, low, high
                offset += self.counts[shard]
                if offset >= stop:
                    return

    def read(self, shard: int, start: int, stop: int) -> Iterator[tuple[ShardIndex, dict[str, Any]]]:
        """The raw samples start..stop of a shard; reads no further than it must."""
        index, number = self.shards[shard]
        for position, raw in enumerate(read_shard(index, number)):
            if position >= start:
                yield index, raw
            if position + 1 == stop < self.counts[shard]:
                return


@dataclass(frozen=True)
class Plan:
    """How a process goes through a data set.

    Args:
        batch_size: samples per batch.
        train: shuffled epochs, or an evaluation that sees every sample once.
        rank: of this process.
        world_size: number of processes.
        seed: seed of the order.
        drop_last: in training, see `train_span`.
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

    Args:
        data: the shards.
        collate: makes batches.
        plan: who reads what.
        shuffle_buffer: number of undecoded samples among which the next one is drawn in training.
    """

    def __init__(self, data: ShardSet, collate: Collate, plan: Plan, shuffle_buffer: int = 1000) -> None:
        super().__init__(data, collate, plan)
        self.shuffle_buffer = shuffle_buffer

    def __iter__(self) -> Iterator[Batch]:
        epoch, reader, done = self.next_pass()
        size, collate = self.plan.batch_size, partial(self.collate, epoch=epoch)
        yield from wds.DataPipeline(
            partial(self._samples, epoch, reader, done * size),
            wds.batched(size, collation_fn=collate, partial=True),
        )

    def _samples(self, epoch: int, reader: Reader, first: int) -> Iterator[Decoded]:
        raw = islice(self._train(epoch, reader), first, None) if self.plan.train else self._evaluate(reader, first)
        for index, sample in raw:
            yield decode_sample(index, sample)

    def _train(self, epoch: int, reader: Reader) -> Iterator[tuple[ShardIndex, dict[str, Any]]]:
        plan = self.plan
        order = torch.randperm(len(self.data.shards), generator=sample_generator(plan.seed, epoch, "shards")).tolist()
        start, stop = train_span(self.data.num_samples, plan.batch_size, plan.drop_last, reader)
        raw = (sample for span in self.data.spans(order, start, stop) for sample in self.data.read(*span))
        yield from shuffled(raw, self.shuffle_buffer, sample_generator(plan.seed, epoch, f"buffer {start}"))

    def _evaluate(self, reader: Reader, first: int) -> Iterator[tuple[ShardIndex, dict[str, Any]]]:
        positions = self.eval_share(reader)[first:]
        if not positions:
            return
        wanted, position = set(positions), positions[0]
        for shard, start, stop in self.data.spans(range(len(self.data.counts)), positions[0], positions[-1] + 1):
            for sample in self.data.read(shard, start, stop):
                if position in wanted:
                    yield sample
                position += 1


class CachedBatches(EpochStream):
    """Holds the decoded samples in memory, and permutes all of them in every training epoch; for small sets.

    The memory is filled once, in the main process, and shared with the workers.

    Args:
        data: the shards.
        collate: makes batches.
        plan: who reads what.
    """

    def __init__(self, data: ShardSet, collate: Collate, plan: Plan) -> None:
        super().__init__(data, collate, plan)
        self.cache = [
            decode_sample(*sample) for shard, count in enumerate(data.counts) for sample in data.read(shard, 0, count)
        ]
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

    def _order(self, epoch: int, reader: Reader) -> Sequence[int]:
        plan, total = self.plan, len(self.cache)
        if not plan.train:
            return list(self.eval_share(reader))
        permutation = torch.randperm(total, generator=sample_generator(plan.seed, epoch, "samples"))
        start, stop = train_span(total, plan.batch_size, plan.drop_last, reader)
        mine: list[int] = permutation[torch.arange(start, stop) % total].tolist()
        return mine


def shuffled(samples: Iterator[T], size: int, generator: torch.Generator) -> Iterator[T]:
    """Draw each next sample from a buffer of `size` that is refilled from the stream."""
    buffer: list[T] = []
    for sample in samples:
        if len(buffer) < size:
            buffer.append(sample)
            continue
        if not buffer:
            yield sample
            continue
        chosen = int(torch.randint(len(buffer), (), generator=generator))
        yield buffer[chosen]
        buffer[chosen] = sample
    for chosen in torch.randperm(len(buffer), generator=generator).tolist():
        yield buffer[chosen]
