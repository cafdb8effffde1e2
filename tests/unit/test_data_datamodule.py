"""The data module by itself and under a Trainer."""

import io
from itertools import chain
from multiprocessing import resource_sharer
from multiprocessing.reduction import ForkingPickler

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from data_helpers import encoded
from lightning.pytorch.callbacks import ModelCheckpoint
from PIL import Image

from flextok_pl.data import Augmentation, ShardDataModule, ShardError, ShardIndex
from flextok_pl.data.encode.encoded import npy
from flextok_pl.data.shards.writer import Sample, shard_name, write_index, write_shard


def png(value, size=8):
    return encoded(Image.new("RGB", (size, size), (value, value, value)))


def write_images(folder, count, per_shard=5, image_size=8, classes=("only",)):
    folder.mkdir()
    samples = [
        Sample(f"i{n}", {"png": png(n, image_size), "cls": str(n % 2 - 1).encode(), "txt": f"grey {n}".encode()})
        for n in range(count)
    ]
    shards = [
        write_shard(folder / shard_name(i), samples[start : start + per_shard])
        for i, start in enumerate(range(0, count, per_shard))
    ]
    write_index(ShardIndex(folder, ("image", "label", "text"), tuple(shards), classes, image_size))
    return str(folder)


def write_latent(folder, **options):
    shard = write_shard(folder / shard_name(0), [Sample("k", {"latent.npy": npy(np.zeros((2, 1, 1), np.float32))})])
    write_index(ShardIndex(folder, ("latent",), (shard,), **options))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    return write_images(root / "train", 26), write_images(root / "val", 13)


class Recorder(pl.LightningModule):
    """Notes the keys that it is trained and validated on."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen, self.validated = [], []

    def training_step(self, batch, batch_idx):
        self.seen.append((self.current_epoch, batch_idx, tuple(batch["key"])))
        return self.weight * batch["image"].mean()

    def validation_step(self, batch, batch_idx):
        self.validated += batch["key"]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(path, **options):
    defaults = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return pl.Trainer(default_root_dir=path, num_sanity_val_steps=0, **{**defaults, "max_epochs": 2, **options})


def module(folders, **options):
    return ShardDataModule(*folders, **{"image_size": 8, "batch_size": 4, "num_workers": 0, **options})


def test_batches_keep_the_contract(folders):
    data = module(folders, augmentation=None)
    batch = next(iter(data.train_dataloader()))
    assert set(batch) == {"image", "label", "text", "key"}
    assert batch["image"].shape == (4, 3, 8, 8) and batch["image"].dtype == torch.float32
    for key, image, label, text in zip(batch["key"], batch["image"], batch["label"], batch["text"], strict=True):
        number = int(key[1:])
        assert image.unique().item() == pytest.approx(number / 127.5 - 1, abs=1e-6)
        assert (label.item(), text) == (number % 2 - 1, f"grey {number}")
    assert data.classes == ("only",)


@pytest.mark.parametrize(
    "train, val, message",
    [
        (("a", "b", "c"), ("a", "c"), "3 and 2 classes; only the former has 'b'; 'c' is number 2 and 1"),
        (("a", "b"), ("b", "a"), "'a' is number 0 and 1"),
        (("a", "b"), ("a", "x"), "only the former has 'b'; only the latter has 'x'"),
        (("0", "1", "2"), ("a", "b"), "3 and 2 classes"),
        (("0", "1"), ("a", "b"), None),  # numbers are no names
        (("a", "b"), ("a", "b"), None),
    ],
)
def test_sets_that_meet_have_the_same_classes(tmp_path, train, val, message):
    sets = [write_images(tmp_path / name, 6, classes=names) for name, names in (("train", train), ("val", val))]
    data = module(sets)
    data.setup("fit")  # a model without classes may use any
    if message is None:
        data.require_same_classes()
        return
    for check in (data.require_same_classes, lambda: module([sets, None]).setup("fit")):
        with pytest.raises(ShardError, match=f"train and .*val differ in classes: {message}.*--classes"):
            check()
    data.setup("validate")
    data.require_same_classes()  # the training set is not looked at
    mixed = module([sets, None], labels=False)
    assert mixed.num_samples("train") == 12
    assert mixed.classes == () and "label" not in next(iter(mixed.train_dataloader()))


@pytest.mark.parametrize("cache", [False, True])
def test_loaders_know_their_lengths(folders, cache):
    data = module(folders, cache_in_memory=cache, eval_batch_size=5, val_limit=11)
    assert len(data.train_dataloader()) == len(list(data.train_dataloader())) == 6
    assert len(data.val_dataloader()) == len(list(data.val_dataloader())) == 3
    assert [data.num_samples(split) for split in ("train", "val", "test")] == [24, 11, 13]
    assert sum(len(batch["key"]) for batch in data.test_dataloader()) == 13


@pytest.mark.parametrize("cache", [False, True])
def test_loaders_follow_the_processes_and_the_batch_size(folders, cache, monkeypatch):
    data, seen = module(folders, cache_in_memory=cache), []
    for rank in (None, 0, 1):
        if rank is not None:
            monkeypatch.setattr(data, "_position", lambda rank=rank: (rank, 2))
        seen.append([key for batch in data.train_dataloader() for key in batch["key"]])
    assert len(seen[1]) == len(seen[2]) == 12 and not {*seen[1]} & {*seen[2]}
    data.batch_size = 2
    assert {len(batch["key"]) for batch in data.train_dataloader()} == {2}
    data.val_limit = 1
    with pytest.raises(ValueError, match="data.val gives 1 samples to 2 processes.* or raise val_limit=1"):
        data.val_dataloader()


@pytest.mark.parametrize("cache, workers", [(False, 0), (True, 0), (False, 2)])
def test_epochs_differ_and_repeat_under_a_trainer(folders, tmp_path, cache, workers):
    runs = []
    for _ in range(2):
        recorder = Recorder()
        data = module(folders, cache_in_memory=cache, num_workers=workers)
        trainer(tmp_path, enable_checkpointing=False).fit(recorder, data)
        runs.append(recorder)
    assert runs[0].seen == runs[1].seen
    epochs = [[keys for epoch, _, keys in runs[0].seen if epoch == e] for e in range(2)]
    assert len(epochs[0]) == len(epochs[1]) == 6 and epochs[0] != epochs[1]
    assert sorted(runs[0].validated) == sorted([f"i{n}" for n in range(13)] * 2)

    loader = module(folders, cache_in_memory=cache, num_workers=workers)
    loader.set_epoch(1)
    assert [tuple(batch["key"]) for batch in loader.train_dataloader()] == epochs[1]


@pytest.mark.parametrize(
    "stop, by, cache, workers",
    [
        (4, "callback", True, 0),
        (6, "callback", True, 0),  # the end of an epoch
        (9, "callback", False, 0),
        (4, "end", True, 0),
        (9, "end", False, 2),
    ],
)
def test_a_resumed_run_repeats_and_skips_nothing(folders, tmp_path, stop, by, cache, workers):
    def fit(steps, ckpt=None, callbacks=()):
        recorder = Recorder()
        run = trainer(
            tmp_path,
            max_epochs=-1,
            max_steps=steps,
            limit_val_batches=0,
            callbacks=list(callbacks),
            enable_checkpointing=bool(callbacks),
        )
        data = module(folders, cache_in_memory=cache, num_workers=workers)
        run.fit(recorder, data, ckpt_path=ckpt, weights_only=False)
        return run, [keys for *_, keys in recorder.seen]

    file = tmp_path / f"step={stop}.ckpt"
    saver = ModelCheckpoint(tmp_path, "{step}", every_n_train_steps=stop, save_top_k=-1)
    _, whole = fit(14, callbacks=[saver] if by == "callback" else [])
    if by == "end":
        run, first = fit(stop)
        assert first == whole[:stop]
        run.save_checkpoint(file)
    _, rest = fit(14, file)
    assert rest == whole[stop:]


@pytest.mark.parametrize("batch_size", [2, 6, 8])
def test_another_batch_size_goes_on_with_the_samples_that_are_left(folders, tmp_path, batch_size):
    saver = ModelCheckpoint(tmp_path, "stop", every_n_train_steps=3, save_top_k=1)

    def fit(ckpt=None, **options):
        recorder = Recorder()
        callbacks = [] if ckpt else [saver]
        run = trainer(tmp_path, max_epochs=2, limit_val_batches=0, callbacks=callbacks, enable_checkpointing=not ckpt)
        run.fit(recorder, module(folders, **options), ckpt_path=ckpt, weights_only=False)
        return run, [keys for *_, keys in recorder.seen]

    saver.save_checkpoint = saver._save_checkpoint
    saver._save_checkpoint = lambda run, path: run.global_step == 3 and saver.save_checkpoint(run, path)
    _, whole = fit()
    first = whole[:3]
    run, rest = fit(tmp_path / "stop.ckpt", batch_size=batch_size)
    total, seen = run.datamodule.shard_set("train").num_samples, [*chain(*first)]
    left = (total - len(seen)) // batch_size
    before, after = [*chain(*rest[:left])], [*chain(*rest[left:])]
    assert not set(before) & set(seen) and len(set(before)) == left * batch_size, "the rest of the first epoch"
    assert len(after) == len(set(after)) == total // batch_size * batch_size, "and the whole second one"


def test_split_over_the_ranks_of_a_trainer(folders):
    seen = []
    for rank in range(2):
        data = module(folders, batch_size=4)
        data.trainer = type("Two", (), {"global_rank": rank, "world_size": 2})()
        assert len(data.train_dataloader()) == 3
        seen += [key for batch in data.val_dataloader() for key in batch["key"]]
    assert sorted(seen) == sorted(f"i{n}" for n in range(13))


def test_augmentation_is_for_training_only(folders):
    data = module(folders, augmentation=Augmentation(crop_scale=(1, 1), scale=(0.5, 0.5)))
    assert next(iter(data.train_dataloader()))["image"].std(dim=(1, 2, 3)).min() > 0  # framed in white
    assert next(iter(data.val_dataloader()))["image"].std(dim=(1, 2, 3)).max() == 0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"image_size": 0}, "image_size=0"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"val_limit": 0}, "val_limit=0"),
        ({"eval_batch_size": 0}, "eval_batch_size=0"),
        ({"max_skipped": -1}, "max_skipped=-1"),
        ({"train_weights": [1.0, 2.0]}, r"train_weights=\[1.0, 2.0\] must be one positive number for each of the 1"),
        ({"train_weights": [0.0]}, r"train_weights=\[0.0\]"),
    ],
)
def test_bad_options_are_named(folders, options, message):
    with pytest.raises(ValueError, match=r"train=\[\] names no set"):
        ShardDataModule(train=[], train_weights=[], val=folders[1])
    with pytest.raises(ValueError, match=message):
        module(folders, **options)


def test_no_source_at_all():
    with pytest.raises(ValueError, match="at least one of train, val and test"):
        ShardDataModule()


def test_missing_split_and_too_large_batch(folders):
    only = ShardDataModule(val=folders[1], image_size=8, num_workers=0)
    assert len(only.test_dataloader()) == 1
    with pytest.raises(ValueError, match="no train set"):
        only.train_dataloader()
    with pytest.raises(ValueError, match="fewer than batch_size=64"):
        module(folders, batch_size=64).train_dataloader()


def test_latents_of_another_image_size(tmp_path):
    write_latent(tmp_path, image_size=64)
    with pytest.raises(ShardError, match="image_size=64"):
        ShardDataModule(str(tmp_path), image_size=32).setup("fit")


def test_enlarging_warns(folders):
    with pytest.warns(UserWarning, match="images of 8 px, which image_size=16 enlarges"):
        module(folders, image_size=16).setup("fit")


def test_token_shards(tmp_path):
    samples = [Sample(f"t{n}", {"tokens.npy": npy(np.arange(n, n + 4, dtype=np.uint16))}) for n in range(3)]
    shard = write_shard(tmp_path / shard_name(0), samples)
    write_index(ShardIndex(tmp_path, ("tokens",), (shard,), image_size=64))
    for cache in (False, True):
        data = ShardDataModule(val=str(tmp_path), image_size=64, num_workers=0, cache_in_memory=cache)
        (batch,) = data.val_dataloader()
        assert batch["tokens"].dtype == torch.int64
        assert batch["tokens"].tolist() == [[0, 1, 2, 3], [1, 2, 3, 4], [2, 3, 4, 5]]


@pytest.mark.parametrize("cache", [False, True])
def test_weighted_sets(folders, tmp_path, cache):
    small = [write_images(tmp_path / name, count) for name, count in (("a", 3), ("b", 6))]
    sources = [folders[0], str(tmp_path / "{a,b}")]
    data = module([sources, folders[1]], train_weights=[1, 1], cache_in_memory=cache, augmentation=None)
    assert data.num_samples("train") == 32 and len(data.train_dataloader()) == 8
    again = module([[folders[0], *small], folders[1]])
    assert data.data_hash("train") != again.data_hash("train") and data.data_hash("val") == again.data_hash("val")
    found = [key for batch in data.train_dataloader() for key in batch["key"]]
    # i9 and above are of the large set only; of 35 samples epochs take 32, half of each entry
    assert len(found) == 32 and sum(int(key[1:]) >= 6 for key in found) > 8
    with pytest.raises(ValueError, match="gets none"):
        module([sources, folders[1]], train_weights=[1, 1e-9]).train_dataloader()


def test_weighted_sets_must_be_of_one_kind(folders, tmp_path):
    write_latent(tmp_path)
    with pytest.raises(ShardError, match="differ in fields"):
        module([[folders[0], str(tmp_path)], folders[1]], train_weights=[1, 1]).setup("fit")


def test_fast_decoding_is_for_training_only_and_near_the_full_one(tmp_path):
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1, 3, 25, 33, generator=generator)
    smooth = torch.nn.functional.interpolate(noise, (400, 528), mode="bicubic").clamp(0, 1)[0]
    buffer = io.BytesIO()
    Image.fromarray((smooth.permute(1, 2, 0) * 255).byte().numpy()).save(buffer, "JPEG", quality=90)
    shard = write_shard(tmp_path / shard_name(0), [Sample("k", {"jpg": buffer.getvalue()})])
    write_index(ShardIndex(tmp_path, ("image",), (shard,)))

    def pictures(fast):
        options = {"image_size": 48, "batch_size": 1, "fast_decode": fast, "num_workers": 0}
        data = ShardDataModule(str(tmp_path), str(tmp_path), **options)
        return [next(iter(loader()))["image"] for loader in (data.train_dataloader, data.val_dataloader)]

    (train, val), (fast_train, fast_val) = pictures(False), pictures(True)
    assert torch.equal(val, fast_val) and not torch.equal(train, fast_train)
    assert (train - fast_train).abs().mean() < 2 / 127.5  # grey levels
    crops = Augmentation(crop_scale=(0.25, 1.0), scale=(1.0, 2.0))
    assert crops.smallest_window == 0.25  # 400 px leave too few for a half-size picture of 48 px
    data = ShardDataModule(str(tmp_path), image_size=48, batch_size=1, augmentation=crops, fast_decode=True)
    assert data.train_dataloader().stream.decoder.least(48) == (384, 384)


def test_rectangles(folders, tmp_path):
    data = module(folders, image_size=(4, 6))
    for loader in (data.train_dataloader(), data.val_dataloader()):
        assert next(iter(loader))["image"].shape[1:] == (3, 4, 6)
    assert (
        module(folders, image_size=[8, 8]).data_hash("val") == module(folders).data_hash("val") != data.data_hash("val")
    )
    assert data.crop == "largest centre window of height to width 4:6, antialiased bicubic"
    with pytest.warns(UserWarning, match=r"images of 8 px, which image_size=\(4, 16\) enlarges"):
        module(folders, image_size=(4, 16)).setup("fit")
    write_latent(tmp_path, image_size=(4, 6))
    assert ShardIndex.load(tmp_path).image_size == (4, 6)
    ShardDataModule(str(tmp_path), image_size=[4, 6]).setup("fit")
    with pytest.raises(ShardError, match=r"made from images of \(4, 6\) px, but image_size=8"):
        ShardDataModule(str(tmp_path), image_size=8).setup("fit")
    for wrong in (0, [8], [8, -1], (8, 8.5)):
        with pytest.raises(ValueError, match="image_size=.* must be a side of at least 1 pixel, or two of them"):
            module(folders, image_size=wrong)


def test_channels(folders):
    for channels in (1, 4):
        data = module(folders, channels=channels, cache_in_memory=channels == 4)
        assert next(iter(data.train_dataloader()))["image"].shape == (4, channels, 8, 8)
        assert data.data_hash("val") != module(folders).data_hash("val")
    with pytest.raises(ValueError, match="channels=2 must be 1 .grey., 3 .colour. or 4 .*write_latents"):
        module(folders, channels=2)


@pytest.mark.parametrize("options", [{}, {"on_error": "skip", "max_skipped": 2}, {"fast_decode": True}])
def test_a_spawned_worker_can_be_sent_the_stream(folders, options):
    """As macOS starts a loader's workers, and others with another start method than fork: by pickling."""
    loader = module(folders, **options).train_dataloader()
    parts = (loader.dataset, loader.collate_fn, loader.worker_init_fn)
    try:
        stream, _, _ = ForkingPickler.loads(bytes(ForkingPickler.dumps(parts)))
    finally:
        resource_sharer.stop(timeout=5)  # what it lends to the new process is served by a thread
    assert [batch["key"] for batch in stream] == [batch["key"] for batch in loader.dataset]
