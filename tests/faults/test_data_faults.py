"""Bad data: a clear error that names shard and sample, and nothing lost."""

import csv
import errno
import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from PIL import Image

from flextok_pl.callbacks import Throughput
from flextok_pl.data import ShardDataModule, ShardError, ShardIndex, write_folder
from flextok_pl.data.shards.index import INDEX_NAME
from flextok_pl.data.shards.writer import PARTIAL_NAME, Sample, shard_name, write_index, write_shard


def picture(kind="JPEG", size=16):
    buffer = io.BytesIO()
    Image.linear_gradient("L").resize((size, 16)).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


def write_set(folder, broken=None, count=8):
    """Two shards of pictures with labels; `broken` replaces files of sample 5, in the second one."""
    folder.mkdir(exist_ok=True)
    shards = []
    for number in range(2):
        samples = []
        for i in range(number * count // 2, (number + 1) * count // 2):
            files = {"jpg": picture(), "cls": b"1", "txt": b"t"}
            if i == 5:
                files.update(broken or {})
            samples.append(Sample(f"k{i}", {name: data for name, data in files.items() if data is not None}))
        shards.append(write_shard(folder / shard_name(number), samples))
    index = ShardIndex(folder, ("image", "label", "text"), tuple(shards), ("a", "b"), 16)
    write_index(index)
    return index


def array_file(array):
    buffer = io.BytesIO()
    np.save(buffer, array, allow_pickle=True)
    return buffer.getvalue()


def write_one(folder, fields, *samples):
    """A set of one shard."""
    shard = write_shard(folder / shard_name(0), [Sample(f"k{i}", files) for i, files in enumerate(samples)])
    write_index(ShardIndex(folder, fields, (shard,), image_size=16))


def pictures_in(folder, count, broken=None):
    """A folder of files 0.jpg, 1.jpg, ..., one of them cut off."""
    folder.mkdir()
    for i in range(count):
        (folder / f"{i}.jpg").write_bytes(picture()[:150] if i == broken else picture())
    return folder


def loaders(folder, **options):
    """Training and evaluation, streamed and cached."""
    for cache in (False, True):
        data = ShardDataModule(
            str(folder), str(folder), image_size=16, batch_size=2, num_workers=0, cache_in_memory=cache, **options
        )
        yield data.train_dataloader
        yield data.val_dataloader


def assert_every_loader_raises(folder, match):
    for loader in loaders(folder):
        with pytest.raises(ShardError, match=match):
            list(loader())


def test_missing_folder_and_folder_without_index(tmp_path):
    assert_every_loader_raises(tmp_path / "nowhere", "matches no shard set: there is no .*nowhere")
    write_set(tmp_path)
    (tmp_path / INDEX_NAME).unlink()
    assert_every_loader_raises(tmp_path, r"has no index\.json")
    data = ShardDataModule(str(tmp_path / "*.none"))
    with pytest.raises(ShardError, match="matches no shard set"):
        data.setup("fit")


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "is missing"),
        (lambda path: path.write_bytes(b""), "has 0 bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes()[:3000]), "has 3,000 bytes instead of"),
        (lambda path: path.write_bytes(path.read_bytes() + b"x"), "truncated or was changed"),
    ],
)
def test_missing_empty_truncated_and_changed_shards(tmp_path, damage, message):
    index = write_set(tmp_path)
    damage(index.paths[1])
    assert_every_loader_raises(tmp_path, rf"shard-000001\.tar {message}|shard-000001\.tar.*{message}")


def test_a_shard_that_may_not_be_read(tmp_path, monkeypatch):
    write_set(tmp_path)
    real = Path.open

    def refuse(self, *given, **options):
        if self.suffix == ".tar":
            raise PermissionError(errno.EACCES, "Permission denied")  # which root does not meet
        return real(self, *given, **options)

    data = ShardDataModule(val=str(tmp_path), image_size=16, num_workers=0)
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ShardError, match=r"shard .*shard-000000.tar cannot be read \(Permission denied\)"):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    "change", [*(lambda whole, n=n: whole[:n] for n in (0, 700, 3000, 5120)), lambda whole: b"\xff" * 10240]
)
def test_broken_tar_of_the_expected_size(tmp_path, change):
    index = write_set(tmp_path)
    index.paths[1].write_bytes(change(index.paths[1].read_bytes()))
    record = json.loads((tmp_path / INDEX_NAME).read_text())
    for shard in record["shards"]:  # so that only reading finds the damage
        shard["bytes"] = (tmp_path / shard["name"]).stat().st_size
    (tmp_path / INDEX_NAME).write_text(json.dumps(record))
    assert_every_loader_raises(
        tmp_path, r"shard-000001\.tar.*(cannot be read|holds \d samples instead of the 4|truncated)"
    )


def test_checksums_are_compared_when_asked(tmp_path):
    index = write_set(tmp_path)
    content = bytearray(index.paths[0].read_bytes())
    content[content.index(b"\xff\xd9") - 3] ^= 1  # within the JPEG: still a picture, but another one
    index.paths[0].write_bytes(content)
    data = ShardDataModule(str(tmp_path), image_size=16, verify_checksums=True)
    with pytest.raises(ShardError, match=r"shard-000000\.tar does not match its checksum"):
        data.setup("fit")


@pytest.mark.parametrize(
    "broken, message",
    [
        ({"jpg": picture()[:200]}, "not a complete picture"),
        ({"jpg": b"no picture"}, "not a complete picture"),
        ({"jpg": None}, "has no picture"),
        ({"cls": b"cat"}, "label b'cat' is not an integer"),
        ({"cls": b"1.5"}, "is not an integer"),
        ({"cls": b"2"}, r"label 2 is outside 0\.\.1"),
        ({"cls": b"-2"}, "label -2 is outside"),
        ({"cls": None}, r"has no \.cls file"),
        ({"txt": None}, r"has no \.txt file"),
        ({"txt": b"\xff\xfe"}, "utf-8"),
    ],
)
def test_broken_samples_are_named(tmp_path, broken, message):
    write_set(tmp_path, broken)
    assert_every_loader_raises(tmp_path, rf"shard-000001\.tar, sample 'k5': .*{message}")


def test_broken_sample_is_named_from_a_worker(tmp_path):
    write_set(tmp_path, {"jpg": b"no picture"})
    data = ShardDataModule(val=str(tmp_path), image_size=16, num_workers=1)
    with pytest.raises(ShardError, match=r"shard-000001\.tar, sample 'k5'"):
        list(data.val_dataloader())


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "contents, message",
    [
        ([array_file(np.zeros((2, 1, 1), np.int64))], "sample 'k0': .*expected 3 axes, kind 'f'"),
        ([array_file(np.zeros((2, 1), np.float32))], "sample 'k0': .*expected 3 axes"),
        ([array_file(np.full((2, 1, 1), np.nan, np.float32))], "sample 'k0': .*not finite"),
        ([array_file(np.array([{"code": "that would run"}], dtype=object))], "Object arrays cannot be loaded"),
        ([b""], "latent.npy is not a complete array"),
        ([b"PK\x03\x04"], "latent.npy is not a complete array"),
        ([b"\x93NUMPY\x01\x00\x10\x00{'descr': (((((((\n"], "latent.npy is not a complete array"),
        ([array_file(np.zeros((2, i, i), np.float32)) for i in (1, 2)], "differ in the shape of their latent"),
    ],
)
def test_broken_latents(tmp_path, cache, contents, message):
    write_one(tmp_path, ("latent",), *({"latent.npy": content} for content in contents))
    data = ShardDataModule(val=str(tmp_path), image_size=16, num_workers=0, cache_in_memory=cache)
    with pytest.raises(ShardError, match=message):
        list(data.val_dataloader())


@pytest.mark.parametrize(
    "change, message",
    [
        ({"format": "other"}, "format 'other'"),
        ({"version": 2}, "version 2"),
        ({"fields": ["image", "code"]}, "fields"),
        ({"shards": [{"name": "x"}]}, "is damaged"),
        ({"shards": []}, "holds no samples"),
        ({"shards": [{"name": "../x.tar", "count": 1, "bytes": 1, "sha256": ""}]}, "leaves the set's folder"),
        ({"shards": [{"name": "pipe:touch ran", "count": 1, "bytes": 1, "sha256": ""}]}, "is missing"),
        *((text, "is damaged") for text in ("", "{", "[]", "\x00")),
    ],
)
def test_damaged_or_hostile_index(tmp_path, change, message):
    write_set(tmp_path)
    record = json.loads((tmp_path / INDEX_NAME).read_text())
    (tmp_path / INDEX_NAME).write_text(change if isinstance(change, str) else json.dumps({**record, **change}))
    with pytest.raises(ShardError, match=message):
        ShardIndex.load(tmp_path)


def test_a_shard_whose_name_looks_like_a_command_is_only_read(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    index = write_set(tmp_path)
    index.paths[0].rename(tmp_path / "pipe:touch ran")
    text = (tmp_path / INDEX_NAME).read_text().replace("shard-000000.tar", "pipe:touch ran")
    (tmp_path / INDEX_NAME).write_text(text)
    data = ShardDataModule(val=str(tmp_path), image_size=16, num_workers=0)
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 8
    assert not (tmp_path / "ran").exists()


def test_full_disk_keeps_finished_shards_and_loses_nothing(tmp_path, monkeypatch):
    source = pictures_in(tmp_path / "src", 6)
    real, added = tarfile.TarFile.addfile, []

    def addfile(self, info, content=None):
        added.append(info.name)
        if len(added) > 5:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, info, content)

    monkeypatch.setattr(tarfile.TarFile, "addfile", addfile)
    with pytest.raises(OSError, match="Free some space and run the same command again") as error:
        write_folder(source, tmp_path / "dst", num_workers=0, samples_per_shard=2)
    assert error.value.errno == errno.ENOSPC and "shard-000002.tar" in str(error.value)
    assert sorted(p.name for p in (tmp_path / "dst").iterdir()) == [
        "index.json.partial",
        "shard-000000.tar",
        "shard-000001.tar",
    ]
    with pytest.raises(ShardError, match=r"has no index\.json"):
        ShardIndex.load(tmp_path / "dst")
    monkeypatch.undo()
    assert write_folder(source, tmp_path / "dst", num_workers=0, samples_per_shard=2)["all"].num_samples == 6


def test_full_disk_while_the_index_is_written(tmp_path, monkeypatch):
    source = pictures_in(tmp_path / "src", 1)

    def full(self, content):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        with pytest.raises(OSError, match="Free some space"):
            write_folder(source, tmp_path / "dst", num_workers=0)
    assert not list((tmp_path / "dst").glob("*index.json")) and not list((tmp_path / "dst").glob(".*"))
    assert write_folder(source, tmp_path / "dst", num_workers=0)["all"].num_samples == 1


@pytest.mark.parametrize("num_workers", [0, 2])
def test_broken_source_picture_stops_or_is_left_out(tmp_path, caplog, num_workers):
    source = pictures_in(tmp_path / "src", 4, broken=2)
    options = {"num_workers": num_workers, "samples_per_shard": 1}
    with pytest.raises(ValueError, match=r"2\.jpg: not a complete picture.*on_error=skip"):
        write_folder(source, tmp_path / "dst", **options)
    assert not list((tmp_path / "dst").glob(".*.partial")) and not (tmp_path / "dst" / INDEX_NAME).exists()
    index = write_folder(source, tmp_path / "dst", on_error="skip", **options)["all"]
    assert index.num_samples == 3 and index.provenance["skipped"] == 1
    with pytest.raises(ShardError, match="is finished, but 1 pictures were left out; pass on_error=skip"):
        write_folder(source, tmp_path / "dst", **options)
    if num_workers == 0:
        assert "2.jpg" in caplog.text
    data = ShardDataModule(val=str(tmp_path / "dst"), image_size=16, num_workers=0)
    assert sum(len(batch["key"]) for batch in data.val_dataloader()) == 3


def test_what_a_broken_picture_stopped_goes_on_without_it(tmp_path):
    source, options = pictures_in(tmp_path / "src", 12, broken=2), {"num_workers": 0, "samples_per_shard": 3}
    whole = write_folder(source, tmp_path / "whole", on_error="skip", **options)["all"]
    (damaged,) = (number for number, shard in enumerate(whole.shards) if shard.count == 2)
    with pytest.raises(ValueError, match=r"2\.jpg: not a complete picture"):
        write_folder(source, tmp_path / "dst", **options)
    before = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("shard-*.tar")}
    assert len(before) == damaged
    assert write_folder(source, tmp_path / "dst", on_error="skip", **options)["all"].shards == whole.shards
    after = {path.name: path.stat().st_mtime_ns for path in (tmp_path / "dst").glob("shard-*.tar")}
    assert before.items() <= after.items()

    # The other way round nothing that was left out is taken for complete.
    (tmp_path / "dst" / INDEX_NAME).rename(tmp_path / "dst" / PARTIAL_NAME)
    arguments = json.dumps(dict(whole.arguments), sort_keys=True)
    (tmp_path / "dst" / PARTIAL_NAME).write_text(arguments)
    with pytest.raises(ValueError, match=r"2\.jpg: not a complete picture"):
        write_folder(source, tmp_path / "dst", **options)


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize(
    "array, message",
    [
        (np.zeros((2, 3, 1), np.float16), "expected 2 axes"),
        (np.zeros((2, 3), np.int64), "expected 2 axes, kind 'f'"),
        (np.full((2, 3), np.inf, np.float16), "not finite"),
        (np.zeros((2, 4), np.float16), "differ in the shape of their text_states"),
        (None, r"has no \.states\.npy file"),
    ],
)
def test_broken_text_states(tmp_path, cache, array, message):
    whole = {"txt": b"t", "states.npy": array_file(np.zeros((1, 3), np.float16))}
    broken = {"txt": b"t"} if array is None else {"txt": b"t", "states.npy": array_file(array)}
    write_one(tmp_path, ("text", "text_states"), whole, broken)
    data = ShardDataModule(val=str(tmp_path), image_size=16, num_workers=0, cache_in_memory=cache)
    with pytest.raises(ShardError, match=message):
        list(data.val_dataloader())


@pytest.mark.parametrize("cache, num_workers", [(False, 0), (False, 1), (True, 0)])
def test_training_may_skip_broken_samples(tmp_path, cache, num_workers, recwarn):
    write_set(tmp_path, {"jpg": b"no picture"})
    options = {"image_size": 16, "batch_size": 4, "num_workers": num_workers, "cache_in_memory": cache}
    data = ShardDataModule(str(tmp_path), str(tmp_path), on_error="skip", **options)
    loader = data.train_dataloader()
    first = [batch["key"] for batch in loader]
    assert [len(keys) for keys in first] == [4, 4]  # another sample takes the place of the broken one
    found = {key for keys in first for key in keys}
    assert len(found) == 7 and "k5" not in found
    assert [batch["key"] for batch in data.train_dataloader()] == first
    assert data.skipped_samples == 1
    if not num_workers:  # a worker warns on its own standard error
        told = [str(w.message) for w in recwarn if "Training skips broken" in str(w.message)]
        assert len(told) == 1 and "shard-000001.tar, sample 'k5'" in told[0]
    with pytest.raises(ShardError, match="sample 'k5'"):
        list(data.val_dataloader())
    strict = ShardDataModule(str(tmp_path), on_error="skip", max_skipped=0, **options)
    with pytest.raises(ShardError, match=r"sample 'k5': .*1 broken samples in this process, more than max_skipped=0"):
        list(strict.train_dataloader())


def test_skipped_samples_are_logged(tmp_path):
    write_set(tmp_path / "set", {"jpg": b"no picture"})
    data = ShardDataModule(str(tmp_path / "set"), image_size=16, batch_size=2, num_workers=2, on_error="skip")
    assert ShardDataModule(str(tmp_path / "set")).skipped_samples is None
    logger = CSVLogger(tmp_path)
    trainer = Trainer(
        accelerator="cpu",
        callbacks=[Throughput(every_n_steps=4)],
        logger=logger,
        max_epochs=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(MeanColour(), datamodule=data)
    (row,) = csv.DictReader((Path(logger.log_dir) / "metrics.csv").open())
    assert float(row["train/skipped_samples"]) == 1


class MeanColour(LightningModule):
    def __init__(self):
        super().__init__()
        self.mean = torch.nn.Parameter(torch.zeros(()))

    def training_step(self, batch, batch_idx):
        return ((batch["image"] - self.mean) ** 2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_a_set_of_broken_samples_only(tmp_path):
    write_one(tmp_path, ("image",), *[{"jpg": b"no picture"}] * 3)
    for cache in (False, True):
        data = ShardDataModule(
            str(tmp_path), image_size=16, batch_size=1, num_workers=0, on_error="skip", cache_in_memory=cache
        )
        with pytest.warns(UserWarning), pytest.raises(ShardError, match="broken"):
            list(data.train_dataloader())
