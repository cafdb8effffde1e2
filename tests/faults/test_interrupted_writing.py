"""Writing latents and tokens, interrupted: what is complete is kept, and the set is that of an uninterrupted run."""

import errno
import json
import multiprocessing
import os
import signal
import tarfile

import pytest
import torch
from PIL import Image

from flextok_pl.data import ShardDataModule, ShardIndex, write_folder, write_latents, write_tokens
from flextok_pl.data import samples as samples_module
from flextok_pl.data.encode import ranks
from flextok_pl.data.shards.index import ShardError
from flextok_pl.data.shards.writer import PARTIAL_NAME, Sample, shard_name, write_shard
from flextok_pl.distributed import VARIABLES


class Model:
    """Stands for tokenizer and autoencoder; what it gives for a picture depends on the whole batch, as kernels may.

    Args:
        kill_at: the call in which the process is killed.
    """

    def __init__(self, kill_at=None):
        self.kill_at, self.calls, self.encoded = kill_at, 0, 0

    def __call__(self, images):
        self.calls += 1
        if self.calls == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.encoded += len(images)
        pooled = torch.nn.functional.avg_pool2d(images, 8) + images.mean() / 2  # (B, 3, 2, 2)
        return torch.cat([pooled, -pooled.abs()], dim=1)

    def tokenize(self, images):
        return (self(images).flatten(1) * 100 + 500).long()  # (B, 24)


def write_encoded_set(kind, source, folder, model, **options):
    """20 samples in 7 shards, from batches of 4, 4, 2 pictures in each of two views."""
    options = {"image_size": 16, "num_views": 2, "batch_size": 4, "samples_per_shard": 3, "num_workers": 0, **options}
    if kind == "latents":
        teacher = {"extract": lambda images: images[:, :, ::4, ::4], "teacher_id": {"name": "stride", "sha256": "a"}}
        return write_latents(str(source), folder, model, source_id={"vae": "pool"}, **teacher, **options)
    identity = {"sha256": "a", "vocab_size": 1000, "num_tokens": 24}
    return write_tokens(str(source), folder, model.tokenize, tokenizer_id=identity, **options)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i in range(10):
        Image.linear_gradient("L").resize((17 + i, 16)).convert("RGB").save(folder / f"{i}.png")
    write_folder(folder, folder / "shards", num_workers=0, samples_per_shard=4)
    return folder / "shards"


def killed(kind, source, folder, kill_at):
    """Run in a process of its own, which ends by SIGKILL within the given call of the model."""
    process = multiprocessing.get_context("fork").Process(
        target=write_encoded_set, args=(kind, source, folder, Model(kill_at))
    )
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL


# Complete shards after each kill, and pictures still to encode: those of all batches that reach beyond these shards.
@pytest.mark.parametrize("kill_at, complete, rest", [(1, 0, 20), (2, 1, 20), (3, 2, 16), (5, 4, 10), (6, 6, 2)])
@pytest.mark.parametrize("kind, num_workers", [("latents", 0), ("tokens", 0), ("tokens", 2)])
def test_a_killed_run_goes_on(pictures, tmp_path, monkeypatch, capsys, kind, num_workers, kill_at, complete, rest):
    whole, folder = tmp_path / "whole", tmp_path / "killed"
    write_encoded_set(kind, pictures, whole, Model())
    killed(kind, pictures, folder, kill_at)
    left = {shard_name(number) for number in range(complete)}
    assert {path.name for path in folder.iterdir()} == {PARTIAL_NAME, *left, f".{shard_name(complete)}.partial"}
    written = {name: (folder / name).stat().st_mtime_ns for name in left}

    capsys.readouterr()
    decoded, real = [], samples_module.decode_image
    monkeypatch.setattr(samples_module, "decode_image", lambda *given: decoded.append(1) or real(*given))
    model = Model()
    index = write_encoded_set(kind, pictures, folder, model, num_workers=num_workers)
    assert contents(folder) == contents(whole)
    assert model.encoded == rest and (num_workers or len(decoded) == rest)
    assert f" {3 * complete}/20 [00:00<?" in capsys.readouterr().err  # where the progress bar starts
    assert written == {name: (folder / name).stat().st_mtime_ns for name in left}
    index.verify()
    data = ShardDataModule(val=str(folder), image_size=16, num_workers=0)
    assert len({key for batch in data.val_dataloader() for key in batch["key"]}) == index.num_samples == 20


def together(pictures, folder, world_size, variables, kill_rank=None):
    """Run several processes at once, as torchrun or srun start them; returns their exit codes."""

    def child(rank):
        ranks.LOOK_EVERY = 0.02
        os.environ |= {variables[0]: str(rank), variables[1]: str(world_size)}
        write_encoded_set("tokens", pictures, folder, Model(kill_at=2 if rank == kill_rank else None))

    processes = [multiprocessing.get_context("fork").Process(target=child, args=(r,)) for r in range(world_size)]
    for process in reversed(processes):  # the first one, which makes the folder ready, comes last
        process.start()
    for rank, process in enumerate(processes):
        process.join(1 if kill_rank is not None and rank != kill_rank else 60)
    codes = [process.exitcode for process in processes]
    for process in processes:  # as torchrun and srun do when one dies
        process.kill()
        process.join()
    return codes


@pytest.mark.parametrize("world_size, variables", [(2, VARIABLES[0]), (3, VARIABLES[1]), (9, VARIABLES[0])])
def test_several_processes_write_what_one_does(pictures, tmp_path, world_size, variables):
    write_encoded_set("tokens", pictures, tmp_path / "whole", Model())
    assert together(pictures, tmp_path / "parts", world_size, variables) == [0] * world_size
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")
    assert together(pictures, tmp_path / "parts", world_size, variables) == [0] * world_size, "there is nothing to do"


def test_one_of_several_processes_is_killed(pictures, tmp_path):
    write_encoded_set("tokens", pictures, tmp_path / "whole", Model())
    assert together(pictures, tmp_path / "parts", 3, VARIABLES[0], kill_rank=1)[1] == -signal.SIGKILL
    assert not (tmp_path / "parts" / "index.json").exists()
    assert together(pictures, tmp_path / "parts", 2, VARIABLES[0]) == [0, 0]
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_several_processes_do_not_overwrite(pictures, tmp_path, monkeypatch):
    write_encoded_set("tokens", pictures, tmp_path, Model())
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ShardError, match="overwrite=true and 2 processes: remove"):
        write_encoded_set("tokens", pictures, tmp_path, Model(), overwrite=True)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["latents", "tokens"])
def test_killed_at_twenty_random_moments(pictures, tmp_path, kind):
    write_encoded_set(kind, pictures, tmp_path / "whole", Model())
    moments = torch.randint(1, 7, (20,), generator=torch.Generator().manual_seed(0)).tolist()
    for number, kill_at in enumerate(moments):
        folder = tmp_path / str(number)
        killed(kind, pictures, folder, kill_at)
        write_encoded_set(kind, pictures, folder, Model())
        assert contents(folder) == contents(tmp_path / "whole")


def test_a_run_killed_more_than_once(pictures, tmp_path):
    write_encoded_set("tokens", pictures, tmp_path / "whole", Model())
    for kill_at in (3, 2, 2):  # within the first view, at its last batch, within the second view
        killed("tokens", pictures, tmp_path / "killed", kill_at)
    model = Model()
    write_encoded_set("tokens", pictures, tmp_path / "killed", model)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and 0 < model.encoded < 20


@pytest.mark.parametrize("options", [{"seed": 1}, {"batch_size": 5}, {"samples_per_shard": 4}])
def test_a_killed_run_with_other_arguments_is_replaced_on_request(pictures, tmp_path, options):
    write_encoded_set("tokens", pictures, tmp_path / "whole", Model(), **options)
    killed("tokens", pictures, tmp_path / "killed", 5)
    before, model = contents(tmp_path / "killed"), Model()
    with pytest.raises(ShardError, match=f"unfinished shard set made with other arguments: {next(iter(options))}="):
        write_encoded_set("tokens", pictures, tmp_path / "killed", model, **options)
    assert contents(tmp_path / "killed") == before and not model.encoded
    write_encoded_set("tokens", pictures, tmp_path / "killed", model, overwrite=True, **options)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole") and model.encoded == 20


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:3000]),
        lambda path: write_shard(path, [Sample("k", {"txt": b""})]),
    ],
)
def test_only_the_shards_before_a_damaged_one_are_kept(pictures, tmp_path, damage):
    write_encoded_set("tokens", pictures, tmp_path / "whole", Model())
    killed("tokens", pictures, tmp_path / "killed", 6)
    damage(tmp_path / "killed" / shard_name(3))
    model = Model()
    write_encoded_set("tokens", pictures, tmp_path / "killed", model)
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")
    assert model.encoded == 12  # from sample 9 on: the last batch of the first view, and the second view


def test_overwriting_a_finished_set_keeps_nothing_of_it(pictures, tmp_path):
    write_encoded_set("tokens", pictures, tmp_path, Model())
    (tmp_path / PARTIAL_NAME).write_text(json.dumps(dict(ShardIndex.load(tmp_path).arguments), sort_keys=True))
    model = Model()
    write_encoded_set("tokens", pictures, tmp_path, model, overwrite=True)
    assert model.encoded == 20


def test_full_disk_while_tokens_are_written(pictures, tmp_path, monkeypatch):
    whole, folder = tmp_path / "whole", tmp_path / "full"
    write_encoded_set("tokens", pictures, whole, Model())
    real, added = tarfile.TarFile.addfile, []

    def addfile(self, info, content=None):
        added.append(info.name)
        if len(added) > 14:  # tokens alone: within the fifth shard
            raise OSError(errno.ENOSPC, "No space left on device")
        real(self, info, content)

    with monkeypatch.context() as patch:
        patch.setattr(tarfile.TarFile, "addfile", addfile)
        with pytest.raises(OSError, match="Free some space and run the same command again") as error:
            write_encoded_set("tokens", pictures, folder, Model())
    assert error.value.errno == errno.ENOSPC and "shard-000004.tar" in str(error.value)

    def full(index):
        raise OSError(errno.ENOSPC, "No space left on device")

    model = Model()
    with monkeypatch.context() as patch:  # once more, where only the index is missing
        patch.setattr("flextok_pl.data.encode.encoded.write_index", full)
        with pytest.raises(OSError, match="No space"):
            write_encoded_set("tokens", pictures, folder, model)
    assert model.encoded == 10
    model = Model()
    write_encoded_set("tokens", pictures, folder, model)
    assert contents(folder) == contents(whole) and model.encoded == 0
