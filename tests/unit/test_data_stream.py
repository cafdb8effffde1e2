"""Who reads what: exactly once, equal shares, the same order for the same seed."""

import io
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flextok_pl.data.index import ShardIndex
from flextok_pl.data.order import Reader, eval_positions, train_span
from flextok_pl.data.samples import Collate
from flextok_pl.data.shards import Sample, shard_name, write_index, write_shard
from flextok_pl.data.sources import load_indices
from flextok_pl.data.stream import CachedBatches, Plan, ShardSet, StreamedBatches

SIZES = (5, 1, 7, 4, 6)


def write_latent_set(folder, sizes=SIZES):
    """Shards of 2-channel latents; sample i holds the value i."""
    folder.mkdir()
    shards, number = [], 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            buffer = io.BytesIO()
            np.save(buffer, np.full((2, 1, 1), number, dtype=np.float16))
            samples.append(Sample(f"k{number}", {"latent.npy": buffer.getvalue(), "cls": str(number % 3).encode()}))
            number += 1
        shards.append(write_shard(folder / shard_name(shard), samples))
    index = ShardIndex(folder, ("latent", "label"), tuple(shards), ("a", "b", "c"), image_size=8)
    write_index(index)
    return index


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    write_latent_set(folder)
    return ShardSet(load_indices(str(folder)))


def readers(world_size, num_workers):
    return [
        Reader(rank, world_size, worker, num_workers) for rank in range(world_size) for worker in range(num_workers)
    ]


@pytest.mark.parametrize("total", [1, 2, 7, 64, 101])
@pytest.mark.parametrize("world_size, num_workers", [(1, 1), (1, 3), (4, 1), (3, 5)])
@pytest.mark.parametrize("limit", [None, 1, 5, 1000])
def test_evaluation_sees_every_sample_once(total, world_size, num_workers, limit):
    seen = [i for reader in readers(world_size, num_workers) for i in eval_positions(total, limit, 4, reader)]
    assert seen == sorted(set(seen))
    assert len(seen) == min(total, limit or total)
    if limit == 5 and total == 101:
        assert seen == [0, 20, 40, 60, 80]


@pytest.mark.parametrize("total", [24, 25, 64, 101])
@pytest.mark.parametrize("world_size, num_workers", [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_training_shares_are_equal_and_disjoint(total, world_size, num_workers):
    spans = [train_span(total, 4, True, reader) for reader in readers(world_size, num_workers)]
    assert all((stop - start) % 4 == 0 for start, stop in spans)
    assert all(a[1] == b[0] for a, b in pairwise(spans))  # side by side
    assert spans[-1][1] == total // (4 * world_size) * 4 * world_size
    per_rank = {
        sum(b - a for a, b in spans[rank * num_workers : (rank + 1) * num_workers]) for rank in range(world_size)
    }
    assert len(per_rank) == 1


def test_keeping_the_last_batch_covers_all_and_wraps_around():
    spans = [train_span(10, 4, False, reader) for reader in readers(3, 1)]
    assert spans == [(0, 4), (4, 8), (8, 12)]  # 10 and 11 are the first two again


def test_worker_shares_follow_the_loader():
    # 5 batches over 2 workers: worker 0 has one more, so that taking turns gives batch i from worker i % 2.
    assert [train_span(20, 4, True, reader) for reader in readers(1, 2)] == [(0, 12), (12, 20)]


def batches(cls, data, plan, epoch=0, num_workers=0, start=0):
    stream = cls(data, Collate(8, None, 0), plan)
    stream.start_at(epoch, start)
    return list(DataLoader(stream, batch_size=None, num_workers=num_workers))


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
def test_batches_hold_what_was_written(cls, data):
    for batch in batches(cls, data, Plan(4, train=True)):
        numbers = [int(key[1:]) for key in batch["key"]]
        assert batch["latent"].dtype == torch.float32 and batch["latent"].shape == (4, 2, 1, 1)
        assert batch["latent"][:, 0, 0, 0].tolist() == numbers
        assert batch["label"].tolist() == [n % 3 for n in numbers] and batch["label"].dtype == torch.int64


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (1, 2), (2, 0), (5, 2)])
def test_readers_together_see_everything_once(cls, data, world_size, num_workers):
    for train in (False, True):
        keys = Counter()
        for rank in range(world_size):
            plan = Plan(2, train=train, rank=rank, world_size=world_size)
            found = batches(cls, data, plan, num_workers=num_workers)
            assert len(found) == len(cls(data, Collate(8, None, 0), plan))
            keys.update(key for batch in found for key in batch["key"])
        assert set(keys.values()) == {1}
        expected = data.num_samples if not train else data.num_samples // (2 * world_size) * 2 * world_size
        assert keys.total() == expected


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
def test_order_follows_seed_and_epoch(cls, data):
    def order(seed, epoch):
        return [key for batch in batches(cls, data, Plan(3, train=True, seed=seed), epoch) for key in batch["key"]]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_evaluation_keeps_the_stored_order(data):
    for cls in (StreamedBatches, CachedBatches):
        found = batches(cls, data, Plan(4, train=False, limit=7))
        assert [key for batch in found for key in batch["key"]] == [f"k{i * 23 // 7}" for i in range(7)]


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
@pytest.mark.parametrize("num_workers", [0, 2, 3])
def test_a_pass_goes_on_where_it_stopped(cls, data, num_workers):
    plan = Plan(2, train=True)
    whole = [batch["key"] for batch in batches(cls, data, plan, 4, num_workers)]
    for start in (1, 2, 7, len(whole)):
        assert [batch["key"] for batch in batches(cls, data, plan, 4, num_workers, start)] == whole[start:]


def test_fewer_samples_than_batches_need_when_the_last_is_kept(data):
    for cls in (StreamedBatches, CachedBatches):
        plans = [Plan(64, train=True, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
        keys = Counter(key for plan in plans for batch in batches(cls, data, plan) for key in batch["key"])
        assert keys.total() == 24 and len(keys) == 23  # one of 23 samples twice, so that both ranks have 12
