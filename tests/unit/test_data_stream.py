"""Who reads what: exactly once, equal shares, the same order for the same seed."""

import multiprocessing
import tracemalloc
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from flextok_pl.data.encode.encoded import npy
from flextok_pl.data.samples import Collate
from flextok_pl.data.shards.index import ShardIndex
from flextok_pl.data.shards.open_shards import Shard
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.writer import Sample, shard_name, write_index, write_shard
from flextok_pl.data.stream import CachedBatches, EpochPlan, ShardSet, StreamedBatches

SIZES = (5, 1, 7, 4, 6)


def write_latent_set(folder, sizes=SIZES, letter="k"):
    """Shards of 2-channel latents; sample i holds the value i."""
    folder.mkdir()
    shards, number = [], 0
    for shard, size in enumerate(sizes):
        samples = []
        for _ in range(size):
            files = {"latent.npy": npy(np.full((2, 1, 1), number, np.float16)), "cls": str(number % 3).encode()}
            samples.append(Sample(f"{letter}{number}", files))
            number += 1
        shards.append(write_shard(folder / shard_name(shard), samples))
    return write_index(ShardIndex(folder, ("latent", "label"), tuple(shards), ("a", "b", "c"), image_size=8))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("latents") / "set"
    write_latent_set(folder)
    return ShardSet(load_indices(str(folder)))


def batches(cls, data, plan, epoch=0, num_workers=0, start=0):
    stream = cls(data, Collate(8, None, 0), plan)
    stream.start_at(epoch, start)
    return list(DataLoader(stream, batch_size=None, num_workers=num_workers))


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
def test_batches_hold_what_was_written(cls, data):
    for batch in batches(cls, data, EpochPlan(4, train=True)):
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
            plan = EpochPlan(2, train=train, rank=rank, world_size=world_size)
            found = batches(cls, data, plan, num_workers=num_workers)
            assert len(found) == len(cls(data, Collate(8, None, 0), plan))
            keys.update(key for batch in found for key in batch["key"])
        assert set(keys.values()) == {1}
        expected = data.num_samples if not train else data.num_samples // (2 * world_size) * 2 * world_size
        assert keys.total() == expected


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
def test_order_follows_seed_and_epoch(cls, data):
    def order(seed, epoch):
        return [key for batch in batches(cls, data, EpochPlan(3, train=True, seed=seed), epoch) for key in batch["key"]]

    assert order(0, 0) == order(0, 0)
    assert order(0, 0) != order(0, 1)
    assert order(0, 0) != order(1, 0)


def test_evaluation_keeps_the_stored_order(data):
    for cls in (StreamedBatches, CachedBatches):
        found = batches(cls, data, EpochPlan(4, train=False, limit=7))
        assert [key for batch in found for key in batch["key"]] == [f"k{i * 23 // 7}" for i in range(7)]


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
@pytest.mark.parametrize("lanes", [1, 4])
@pytest.mark.parametrize("train", [True, False])
def test_workers_do_not_matter_nor_where_a_pass_goes_on(cls, lanes, train, data):
    plan = EpochPlan(2, train=train, lanes=lanes)
    whole = [batch["key"] for batch in batches(cls, data, plan, 4)]
    assert len(whole) == (11 if train else 12)
    for num_workers in (0, 1, 3):
        for start in (0, 2, 14, 22):
            rest = [batch["key"] for batch in batches(cls, data, plan, 4, num_workers, start)]
            assert rest == whole[start // 2 :]


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
@pytest.mark.parametrize("lanes", [1, 4, 3])
def test_ranks_do_not_matter_to_a_step(cls, lanes, data):
    """One rank with a batch of 4, two with 2 and four with 1 take the same samples at every step."""
    steps = {}
    for world_size in (1, 2, 4):
        ranks = [
            batches(cls, data, EpochPlan(4 // world_size, True, rank, world_size, lanes=lanes), 1, num_workers=2)
            for rank in range(world_size)
        ]
        steps[world_size] = [{key for batch in step for key in batch["key"]} for step in zip(*ranks, strict=True)]
    assert steps[1] == steps[2] == steps[4] and len(steps[1]) == 5


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
def test_a_pass_goes_on_with_other_ranks_and_batches(cls, data):
    plans = [EpochPlan(3, train=True, rank=rank, world_size=2, lanes=2) for rank in range(2)]
    first = [key for plan in plans for batch in batches(cls, data, plan, 1)[:2] for key in batch["key"]]
    rest = [
        key for batch in batches(cls, data, EpochPlan(5, train=True, lanes=2), 1, 3, start=12) for key in batch["key"]
    ]
    assert len(first) == 12 and len(rest) == 10 and not set(first) & set(rest)


def test_as_many_lanes_as_ranks_keep_a_rank_in_its_own_shards(tmp_path, monkeypatch):
    data = linked_set(tmp_path / "set", 40)
    opened, real = [], Shard.__init__
    monkeypatch.setattr(Shard, "__init__", lambda self, *given: opened.append(given[1]) or real(self, *given))
    per_rank = []
    for rank in range(4):
        opened.clear()
        plan = EpochPlan(10, train=True, rank=rank, world_size=4, lanes=4)
        list(StreamedBatches(data, Collate(8, None, 0), plan, shuffle_buffer=100))
        per_rank.append(set(opened))
        assert len(opened) == len(per_rank[-1]) == 10, "each shard is opened once"
    assert len(set().union(*per_rank)) == 40


def test_fewer_samples_than_batches_need_when_the_last_is_kept(data):
    for cls in (StreamedBatches, CachedBatches):
        plans = [EpochPlan(64, train=True, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
        keys = Counter(key for plan in plans for batch in batches(cls, data, plan) for key in batch["key"])
        assert keys.total() == 24 and len(keys) == 23  # one of 23 samples twice, so that both ranks have 12


@pytest.mark.parametrize("size", [0, 3, 100])
def test_groups_are_permuted_and_keep_every_sample(data, size):
    stream = StreamedBatches(data, Collate(8, None, 0), EpochPlan(23, train=True), shuffle_buffer=size)
    (batch,) = DataLoader(stream, batch_size=None)
    numbers = [int(key[1:]) for key in batch["key"]]
    assert sorted(numbers) == list(range(23))
    # Without shuffling each of the 5 shards comes in one piece and in its order.
    assert (sum(b != a + 1 for a, b in pairwise(numbers)) < 5) == (size == 0)


def linked_set(folder, copies, per_shard=50):
    """Many shards that are one file."""
    index = write_latent_set(folder, [per_shard])
    for number in range(1, copies):
        (folder / shard_name(number)).hardlink_to(folder / shard_name(0))
    shards = [replace(index.shards[0], name=shard_name(number)) for number in range(copies)]
    write_index(replace(index, shards=tuple(shards)))
    return ShardSet(load_indices(str(folder)))


def test_a_resumed_epoch_reads_what_it_delivers_and_opens_no_shard_before_it(tmp_path, monkeypatch):
    data = linked_set(tmp_path / "set", 200)
    opened, read, real_read = [], [], Shard.read
    real_open = Shard.__init__
    monkeypatch.setattr(Shard, "__init__", lambda self, *given: opened.append(given) or real_open(self, *given))
    monkeypatch.setattr(Shard, "read", lambda self, sample: read.append(sample) or real_read(self, sample))
    stream = StreamedBatches(data, Collate(8, None, 0), EpochPlan(10, train=True), shuffle_buffer=200)
    stream.start_at(0, 7550)
    next(iter(stream))
    assert len(read) == 10 and 0 < len(opened) <= 2 * 5  # of 200: this group of 4 and the next, not all aligned


def only_key(index, raw, size):
    return {"key": raw["__key__"]}


def test_memory_does_not_grow_with_the_set(tmp_path):
    sets = {copies: linked_set(tmp_path / str(copies), copies) for copies in (20, 200)}

    def peak(copies):
        stream = StreamedBatches(sets[copies], Collate(8, None, 0), EpochPlan(10, train=True), only_key, 200)
        tracemalloc.start()
        assert sum(len(batch["key"]) for batch in stream) == 50 * copies
        result = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return result

    def measure(sender):
        peak(20)  # what is imported on the way counts once
        sender.send((peak(20), peak(200)))

    # In a process of its own, which has none of the threads of this one. How many shards are open at the peak depends
    # on the background thread, a quarter more or less; 20 bytes kept of each sample would double it.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=measure, args=(sender,))
    process.start()
    sender.close()
    small, large = receiver.recv()
    process.join()
    assert large < 2 * small, (small, large)


@pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])
@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 2), (3, 0)])
def test_weights_hold_and_nothing_comes_twice_before_all(tmp_path, cls, world_size, num_workers):
    sizes = {"a": (5, 1, 7, 4, 6, 19), "b": (3, 3)}  # 42 and 6 samples; epochs of 48 take 36 and 12
    for name, shards in sizes.items():
        write_latent_set(tmp_path / name, shards, name)
    data = ShardSet(load_indices([str(tmp_path / "a"), str(tmp_path / "b")]), (3.0, 1.0))
    seen = Counter()
    for epoch in range(5):
        before = seen.copy()
        for rank in range(world_size):
            plan = EpochPlan(4, train=True, rank=rank, world_size=world_size)
            found = batches(cls, data, plan, epoch, num_workers)
            assert len(found) == len(cls(data, Collate(8, None, 0), plan)) == 12 // world_size
            seen.update(key for batch in found for key in batch["key"])
            rest = [batch["key"] for batch in batches(cls, data, plan, epoch, num_workers, 2 * plan.together)]
            assert rest == [batch["key"] for batch in found[2:]]
        taken = Counter(key[0] for key in (seen - before).elements())
        assert taken == {"a": 36, "b": 12}
        for name, shards in sizes.items():
            counts = [count for key, count in seen.items() if key[0] == name]
            assert len(counts) == min(sum(shards), sum(counts)) and max(counts) - min(counts) <= 1
