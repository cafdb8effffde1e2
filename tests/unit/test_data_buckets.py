"""Batches of one shape each: exactly once, equal shares, the same order whoever reads and resumes."""

from collections import Counter
from dataclasses import replace
from itertools import chain

import lightning.pytorch as pl
import pytest
import torch
from data_helpers import encoded
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image
from torch.utils.data import DataLoader

from flextok_pl.cli import main
from flextok_pl.data import Augmentation, ShardDataModule, ShardError, ShardIndex, write_latents, write_resharded
from flextok_pl.data.buckets import interleaved
from flextok_pl.data.samples import Collate
from flextok_pl.data.shards.index import INDEX_NAME
from flextok_pl.data.shards.open_shards import Shard
from flextok_pl.data.shards.sizes import parse_sizes, size_text
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.writer import Sample, shard_name, write_index, write_shard
from flextok_pl.data.stream import CachedBatches, EpochPlan, ShardSet, StreamedBatches

SHAPES = ((8, 8), (6, 12), (12, 6))
SIZES = [(16, 16), (24, 12), (11, 20), (17, 16), (40, 16), (16, 16), (12, 25)]
"""Width and height of pictures, again and again."""
NEAREST = [(8, 8), (6, 12), (12, 6), (8, 8), (6, 12), (8, 8), (12, 6)]
BOTH = pytest.mark.parametrize("cls", [StreamedBatches, CachedBatches])


def write_pictures(folder, count=53, per_shard=6, letter="i"):
    """Picture n is of one grey level."""
    folder.mkdir()
    samples = [
        Sample(f"{letter}{n}", {"png": encoded(Image.new("RGB", SIZES[n % len(SIZES)], (n, n, n))), "cls": b"0"})
        for n in range(count)
    ]
    starts = range(0, count, per_shard)
    shards = [write_shard(folder / shard_name(i), samples[n : n + per_shard]) for i, n in enumerate(starts)]
    write_index(ShardIndex(folder, ("image", "label"), tuple(shards), ("only",)))
    return str(folder)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("pictures") / "set")


@pytest.fixture(scope="module")
def data(folder):
    return ShardSet(load_indices(folder), shapes=SHAPES)


def batches(cls, data, plan, epoch=0, num_workers=0, taken=0, augmentation=None):
    stream = cls(data, Collate(8, augmentation, 0), plan, *([] if cls is CachedBatches else [None, 12]))
    stream.start_at(epoch, taken)
    found = list(DataLoader(stream, batch_size=None, num_workers=num_workers))
    assert len(found) == stream.batches_left(taken)
    return found


def keys(found):
    return [batch["key"] for batch in found]


def shape_of(key):
    return NEAREST[int(key[1:]) % len(SIZES)]


@BOTH
@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("world_size, num_workers", [(1, 0), (2, 2), (3, 0)])
def test_every_sample_comes_once_in_its_shape(cls, train, world_size, num_workers, data):
    seen, lengths = Counter(), []
    for rank in range(world_size):
        found = batches(cls, data, EpochPlan(2, train=train, rank=rank, world_size=world_size), 3, num_workers)
        lengths.append(len(found))
        for batch in found:
            (shape,) = {shape_of(key) for key in batch["key"]}
            assert batch["image"].shape[1:] == (3, *shape)
            numbers = torch.tensor([int(key[1:]) for key in batch["key"]])
            assert torch.equal(((batch["image"] + 1) * 127.5).round().mean(dim=(1, 2, 3)), numbers.float())
        seen.update(chain(*keys(found)))
    assert set(seen.values()) == {1}
    of_shape = Counter(shape_of(f"i{n}") for n in range(53))
    together = 2 * world_size
    assert seen.total() == (sum(n // together * together for n in of_shape.values()) if train else 53)
    assert not train or len(set(lengths)) == 1


@BOTH
def test_nothing_is_left_out_where_the_last_batch_is_kept(cls, data):
    plans = [EpochPlan(4, train=True, rank=rank, world_size=2, drop_last=False) for rank in range(2)]
    found = [batches(cls, data, plan) for plan in plans]
    for one, other in zip(*found, strict=True):
        assert one["image"].shape == other["image"].shape
    seen = Counter(key for each in found for batch in each for key in batch["key"])
    assert len(seen) == 53 and seen.total() <= 53 + 3, "some come twice, so that both ranks have as many"


@BOTH
def test_all_ranks_have_one_shape_and_their_number_does_not_matter(cls, data):
    steps = {}
    for world_size in (1, 2, 4):
        plans = [EpochPlan(4 // world_size, True, rank, world_size, seed=1, lanes=2) for rank in range(world_size)]
        ranks = [keys(batches(cls, data, plan, 1)) for plan in plans]
        steps[world_size] = [{*chain(*step)} for step in zip(*ranks, strict=True)]
    assert steps[1] == steps[2] == steps[4] and len(steps[1]) == 11
    assert all(len({shape_of(key) for key in step}) == 1 for step in steps[1])


@BOTH
def test_order_follows_seed_and_epoch_and_mixes_the_shapes(cls, data):
    def order(seed, epoch):
        return keys(batches(cls, data, EpochPlan(2, train=True, seed=seed), epoch))

    first = order(0, 0)
    assert first == order(0, 0) != order(0, 1) and first != order(1, 0)
    shapes = [[shape_of(batch[0]) for batch in each] for each in (first, order(0, 1))]
    assert shapes[0] != shapes[1] and Counter(shapes[0]) == Counter(shapes[1])
    for half in (shapes[0][:13], shapes[0][13:]):  # 12, 7 and 7 of them
        assert 4 <= half.count((8, 8)) <= 8 and half.count((6, 12)) >= 2 and half.count((12, 6)) >= 2


@BOTH
@pytest.mark.parametrize("train", [True, False])
def test_a_pass_goes_on_where_it_was(cls, train, data):
    plan = EpochPlan(2, train=train, world_size=1)
    whole, stream = batches(cls, data, plan, 4), cls(data, Collate(8, None, 0), plan)
    taken, crops = [0, 0, 0], Augmentation()
    for step, (bucket, _) in enumerate(stream.steps(4, 0)):
        if step in (1, 10, 25):
            for num_workers in (0, 3) if step == 10 else (0,):
                assert keys(batches(cls, data, plan, 4, num_workers, taken)) == keys(whole[step:])
        taken[bucket] += 2
    one, other = (batches(cls, data, plan, 4, 0, each, crops) for each in (0, [8, 4, 2]))
    cropped = {key: image for batch in one for key, image in zip(batch["key"], batch["image"], strict=True)}
    for batch in other:
        assert all(torch.equal(cropped[key], image) for key, image in zip(batch["key"], batch["image"], strict=True))


@BOTH
def test_a_pass_goes_on_with_other_ranks_and_batches(cls, data):
    plan = EpochPlan(2, train=True, world_size=2)
    stream, taken = cls(data, Collate(8, None, 0), plan), [0, 0, 0]
    steps = [bucket for bucket, _ in stream.steps(1, 0)][:5]
    for bucket in steps:
        taken[bucket] += plan.together
    first = [key for rank in range(2) for key in chain(*keys(batches(cls, data, replace(plan, rank=rank), 1)[:5]))]
    rest = [*chain(*keys(batches(cls, data, EpochPlan(3, train=True, drop_last=False), 1, 2, taken)))]
    assert len(first) == 20 and sorted(first + rest) == sorted(f"i{n}" for n in range(53))


@BOTH
def test_weights_hold_in_every_shape(cls, tmp_path):
    sets = [write_pictures(tmp_path / name, count, letter=name) for name, count in (("a", 42), ("b", 14))]
    data, seen = ShardSet(load_indices(sets), (1.0, 1.0), SHAPES), Counter()
    for epoch in range(3):
        found = batches(cls, data, EpochPlan(2, train=True, drop_last=False), epoch)
        of_epoch = Counter(chain(*keys(found)))
        taken = Counter(key[0] for key in of_epoch.elements())
        assert abs(taken["a"] - 28) <= 3 and taken.total() >= 56
        assert all(len({shape_of(key) for key in batch}) == 1 for batch in keys(found))
        seen.update(of_epoch)
    assert len([key for key in seen if key[0] == "b"]) == 14


def test_a_limited_evaluation_takes_the_same_samples_as_of_one_shape(data):
    found = batches(StreamedBatches, data, EpochPlan(4, train=False, limit=10))
    assert sorted(chain(*keys(found))) == sorted(f"i{i * 53 // 10}" for i in range(10))


def test_each_shard_is_opened_once(tmp_path, monkeypatch):
    data = ShardSet(load_indices(write_pictures(tmp_path / "set", 200, 10)), shapes=SHAPES)
    opened, real = [], Shard.__init__
    monkeypatch.setattr(Shard, "__init__", lambda self, *given: opened.append(given[1]) or real(self, *given))
    for plan in (EpochPlan(8, train=True), EpochPlan(8, train=False)):
        opened.clear()
        assert sum(map(len, keys(batches(StreamedBatches, data, plan)))) > 180
        assert sorted(opened) == list(range(20))


def test_batches_come_as_evenly_as_they_can():
    starts = [range(0, 100, 10), range(0, 30, 10), range(0, 10, 10)]
    order = [bucket for bucket, _ in interleaved(starts, [100, 30, 10], 10, lambda bucket, start: 0.5)]
    assert Counter(order) == {0: 10, 1: 3, 2: 1}
    assert [i for i, bucket in enumerate(order) if bucket == 1] == [2, 6, 11] and order.index(2) == 7


class Recorder(pl.LightningModule):
    """Notes the keys that it is trained on."""

    def __init__(self):
        super().__init__()
        self.weight, self.seen = torch.nn.Parameter(torch.zeros(())), []

    def training_step(self, batch, batch_idx):
        self.seen.append(tuple(batch["key"]))
        return self.weight * batch["image"].mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit(folder, place, steps, ckpt=None, callbacks=(), **options):
    recorder, quiet = Recorder(), dict.fromkeys(("logger", "enable_progress_bar", "enable_model_summary"), False)
    run = pl.Trainer(
        accelerator="cpu",
        default_root_dir=place,
        max_epochs=-1,
        max_steps=steps,
        callbacks=[*callbacks],
        enable_checkpointing=bool(callbacks),
        **quiet,
    )
    chosen = {"image_size": 8, "batch_size": 4, "num_workers": 0, "shapes": SHAPES, **options}
    run.fit(recorder, ShardDataModule(folder, **chosen), ckpt_path=ckpt, weights_only=False)
    return recorder.seen


@pytest.mark.parametrize("cache, stop", [(False, 5), (False, 11), (True, 17)])
def test_a_resumed_run_repeats_and_skips_nothing(folder, tmp_path, cache, stop):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    whole = fit(folder, tmp_path, 26, callbacks=[saver], cache_in_memory=cache)  # an epoch has 11 steps
    rest = fit(folder, tmp_path, 26, tmp_path / f"step={stop}.ckpt", cache_in_memory=cache)
    assert rest == whole[stop:]


def test_a_run_goes_on_with_another_batch_size_but_not_with_other_shapes(folder, tmp_path):
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=5, save_top_k=-1)
    first = [*chain(*fit(folder, tmp_path, 5, callbacks=[saver]))]
    file = tmp_path / "step=5.ckpt"
    assert torch.load(file, weights_only=True)["loops"]["fit_loop"]["state_dict"]["combined_loader"][0][
        "samples"
    ].keys()
    left = {f"i{n}" for n in range(53)} - {*first}
    steps = sum(n // 2 for n in Counter(map(shape_of, left)).values())
    rest = fit(folder, tmp_path, 5 + steps + 25, file, batch_size=2)
    before, after = ([*chain(*part)] for part in (rest[:steps], rest[steps:]))
    assert len(set(before)) == 2 * steps >= len(left) - 3 and set(before) <= left, "the rest of the first epoch"
    assert len(set(after)) == len(after) == 2 * 25, "and the whole second one"
    for other in (None, [(8, 8), (4, 16), (16, 4)]):
        with pytest.raises(ValueError, match=r"within an epoch with data\.shapes=8x8, 6x12, 12x6"):
            fit(folder, tmp_path, 9, file, shapes=other)


def test_evaluation_takes_one_size_unless_it_is_told(folder, capsys):
    options = {"image_size": (8, 10), "batch_size": 4, "num_workers": 0, "shapes": SHAPES}
    plain, shaped = (ShardDataModule(folder, folder, eval_shapes=each, **options) for each in (False, True))
    assert {batch["image"].shape[2:] for batch in plain.val_dataloader()} == {(8, 10)}
    assert {batch["image"].shape[2:] for batch in shaped.val_dataloader()} == set(SHAPES)
    assert "samples of data.val by shape: 8x8: 23, 6x12: 15, 12x6: 15" in capsys.readouterr().err
    assert plain.num_samples("val") == shaped.num_samples("val") == 53 and plain.num_samples("train") == 44
    hashes = {each.data_hash(split) for each in (plain, shaped) for split in ("train", "val")}
    assert len(hashes) == 3 and "8:10" in plain.crop and "6x12" in shaped.crop


@pytest.mark.parametrize(
    "shapes, message",
    [
        ([], r"shapes=\[\] must name at least one"),
        ([[8, 0]], r"shapes=\[8, 0\] must be a side of at least 1 pixel"),
        ([[8, 8, 8]], r"shapes=\[8, 8, 8\]"),
        ([[8, 16], [4, 8]], "shapes: 8x16 and 4x8 have the same aspect ratio"),
    ],
)
def test_bad_shapes_are_named(folder, shapes, message):
    with pytest.raises(ValueError, match=message):
        ShardDataModule(folder, shapes=shapes)


def test_more_that_does_not_fit(folder):
    with pytest.raises(ValueError, match="eval_shapes=true needs shapes"):
        ShardDataModule(folder, eval_shapes=True)
    with pytest.warns(UserWarning, match=r"16x16 has 2\.7 times the pixels of 8x12"):
        ShardDataModule(folder, shapes=[[16, 16], [8, 12]])
    with pytest.raises(ValueError, match="shape 6x12 of the training set has 15 samples, fewer than batch_size=16"):
        ShardDataModule(folder, shapes=SHAPES, batch_size=16, num_workers=0).train_dataloader()
    kept = ShardDataModule(folder, shapes=SHAPES, batch_size=16, num_workers=0, drop_last=False)
    assert len(list(kept.train_dataloader())) == 4


def test_sizes_as_text():
    sizes = [(5, 7), (5, 7), (12, 3), (5, 7)]
    assert size_text(sizes) == "5x7*2 12x3 5x7" and parse_sizes("5x7*2 12x3 5x7").tolist() == [*map(list, sizes)]
    assert parse_sizes("").shape == (0, 2)
    for wrong in ("5x", "5x7*0", "-5x7", "5x7,6x8"):
        with pytest.raises(ValueError, match="sizes of pictures"):
            parse_sizes(wrong)


def test_sizes_are_of_pictures_as_they_are_seen(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # rotated by a quarter
    turned = encoded(Image.new("RGB", (9, 4)), "JPEG", exif=exif)
    info = write_shard(
        tmp_path / shard_name(0), [Sample("a", {"jpg": turned}), Sample("b", {"cls": b"0", "jpg": turned})]
    )
    assert info.sizes == "4x9*2"
    broken = [Sample("a", {"jpg": turned}), Sample("b", {"jpg": b"no picture"})]
    assert write_shard(tmp_path / shard_name(1), broken).sizes == ""


def test_sets_of_earlier_releases_are_measured_once(folder, tmp_path, capsys):
    index = ShardIndex.load(folder)
    old = tmp_path / "old"
    old.mkdir()
    for shard in index.shards:
        (old / shard.name).hardlink_to(index.folder / shard.name)
    write_index(replace(index, folder=old, shards=tuple(replace(shard, sizes="") for shard in index.shards)))
    assert "sizes" not in (old / INDEX_NAME).read_text()
    with pytest.raises(ShardError, match="0 of 6 in shard-000000.tar; add them with: flextok data measure .*old"):
        ShardDataModule(str(old), shapes=SHAPES).setup("fit")
    for said in ("measured 53 pictures", "has the sizes of its 53 pictures"):
        main(["data", "measure", str(old), "--num_workers", "0"])
        assert said in capsys.readouterr().out
    assert ShardIndex.load(old).shards == index.shards and ShardIndex.load(old).digest() == index.digest()
    (old / INDEX_NAME).write_text((old / INDEX_NAME).read_text().replace("16x16", "16x", 1))
    with pytest.raises(ShardError, match="sizes of pictures must be written"):
        ShardDataModule(str(old), shapes=SHAPES).setup("fit")


def test_pictures_of_one_known_size_need_no_measuring(tmp_path):
    index = ShardIndex.load(write_pictures(tmp_path / "set", 4))
    one = replace(index, image_size=(12, 24), shards=tuple(replace(shard, sizes="") for shard in index.shards))
    assert [bucket.name for bucket in ShardSet([one], shapes=SHAPES).buckets] == ["6x12"]


def moments(images):
    """(B, 3, H, W) -> (B, 2, H/2, W/2)."""
    return images[:, :2, ::2, ::2]


def test_latents_of_several_shapes(folder, tmp_path, monkeypatch):
    options = {"source_id": {"sha256": "x"}, "shapes": SHAPES, "num_views": 2, "batch_size": 4, "num_workers": 0}
    index = write_latents(folder, tmp_path / "whole", moments, samples_per_shard=9, **options)
    assert index.num_samples == 106 and index.image_size is None

    calls = []

    def fails(images):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return moments(images)

    with pytest.raises(KeyboardInterrupt):
        write_latents(folder, tmp_path / "killed", fails, samples_per_shard=9, **options)
    again = write_latents(folder, tmp_path / "killed", moments, samples_per_shard=9, **options)
    assert again.shards == index.shards, "an interrupted set is the same, byte for byte"
    main(["data", "verify", str(tmp_path / "whole"), "--num_workers", "0"])

    place = str(tmp_path / "whole")
    for cache in (False, True):
        data = ShardDataModule(place, batch_size=4, num_workers=0, shapes=SHAPES, cache_in_memory=cache)
        found = list(data.train_dataloader())
        assert len({*chain(*keys(found))}) == data.num_samples("train") == 100
        for batch in found:
            (shape,) = {shape_of(key.partition("_")[0]) for key in batch["key"]}
            assert batch["latent"].shape[1:] == (2, shape[0] // 2, shape[1] // 2)
    with pytest.raises(ShardError, match=r"made in several shapes; set shapes=\[\[8, 8\], \[6, 12\], \[12, 6\]\]"):
        ShardDataModule(place).setup("fit")
    with pytest.raises(ShardError, match=r"made from pictures of 12x6, which are not in shapes=\['8x8', '6x12'\]"):
        ShardDataModule(place, shapes=SHAPES[:2]).setup("fit")
    with pytest.raises(ShardError, match="was made in several shapes, so its order is fixed"):
        write_resharded(place, tmp_path / "again", num_workers=0)
