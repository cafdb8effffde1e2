"""Writing shard sets: equal bytes for equal input, safe reruns, nothing half-written."""

import json
import os
import shutil
import signal
import tarfile

import pytest
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data.pictures import open_pictures
from flextok_pl.data.shards.index import INDEX_NAME, ShardError, ShardIndex
from flextok_pl.data.shards.sources import load_indices
from flextok_pl.data.shards.writer import (
    PARTIAL_NAME,
    Sample,
    complete_shard,
    shard_name,
    shard_sizes,
    start_set,
    write_index,
    write_shard,
    write_shards,
)


def make_samples(numbers):
    return [Sample(f"s{n}", {"cls": b"0", "txt": f"number {n}".encode()}) for n in numbers if n != 3]


def write_set(folder, count=10, workers=0, overwrite=False, per_shard=4):
    arguments = {"count": count, "per_shard": per_shard}
    ready = start_set(folder, arguments, overwrite)
    if ready is None:
        shards = write_shards(folder, range(count), make_samples, "shards", workers, per_shard, leaves_out=True)
        contents = ("label", "text"), tuple(shards), ("only",), None, arguments, {"by": "test"}
        ready = write_index(ShardIndex(folder, *contents))
    return ready


def test_counts_names_and_content(tmp_path):
    index = write_set(tmp_path / "set")
    assert [s.count for s in index.shards] == [3, 3, 3]  # item 3 is left out
    assert index.num_samples == 9
    with tarfile.open(index.paths[0]) as tar:
        assert tar.getnames() == ["s0.cls", "s0.txt", "s1.cls", "s1.txt", "s2.cls", "s2.txt"]
        assert tar.extractfile("s2.txt").read() == b"number 2"
        assert {(m.mtime, m.uid, m.gid, m.uname) for m in tar.getmembers()} == {(0, 0, 0, "")}
    assert sorted(os.listdir(tmp_path / "set")) == [INDEX_NAME, *(s.name for s in index.shards)]
    record = json.loads((tmp_path / "set" / INDEX_NAME).read_text())
    assert record["num_samples"] == 9 and record["provenance"] == {"by": "test"}
    assert ShardIndex.load(tmp_path / "set") == index


def test_workers_write_the_same_bytes(tmp_path):
    alone, several = write_set(tmp_path / "a"), write_set(tmp_path / "b", workers=2)
    assert alone.shards == several.shards


@pytest.mark.parametrize(
    "total, most, sizes",
    [(1001, 1000, [501, 500]), (20, 3, [3, 3, 3, 3, 3, 3, 2]), (4, 4, [4]), (5, 4, [3, 2]), (1, 9, [1]), (0, 4, [])],
)
def test_shards_are_alike_in_size(total, most, sizes):
    assert shard_sizes(total, most) == sizes


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("left", [[], [0], [2, 4], [1, 3], [0, 1, 2, 3, 4]])
def test_any_complete_shards_of_an_interrupted_run_are_kept(tmp_path, monkeypatch, workers, left):
    whole = write_set(tmp_path / "whole", count=18)
    start_set(tmp_path / "part", dict(whole.arguments), overwrite=False)
    for number in left:
        shutil.copy2(whole.paths[number], tmp_path / "part")
    damaged = [number for number in range(5) if number not in left][:1]
    for number in damaged:
        content = whole.paths[number].read_bytes()
        (tmp_path / "part" / shard_name(number)).write_bytes(content[: 512 * 3])
    before = {shard_name(number): os.stat(tmp_path / "part" / shard_name(number)).st_mtime_ns for number in left}
    index = write_set(tmp_path / "part", count=18, workers=workers)
    assert {path.name: path.read_bytes() for path in index.folder.iterdir()} == {
        path.name: path.read_bytes() for path in whole.folder.iterdir()
    }
    assert before == {name: os.stat(tmp_path / "part" / name).st_mtime_ns for name in before}


def test_a_shard_that_was_cut_is_not_taken_for_complete(tmp_path):
    path = tmp_path / "shard-000000.tar"
    info = write_shard(path, make_samples(range(3)))
    assert complete_shard(path) == info
    path.write_bytes(path.read_bytes()[: 4 * 1024])  # after the second sample, where one that leaves out may have ended
    assert complete_shard(path) is None


def test_a_shard_of_which_nothing_is_left_is_no_file(tmp_path):
    index = write_set(tmp_path, per_shard=1)  # item 3 is left out
    assert len(index.shards) == 9 and shard_name(3) not in os.listdir(tmp_path)


def test_a_killed_worker_is_named(tmp_path):
    start_set(tmp_path, {}, overwrite=False)
    with pytest.raises(OSError, match="a worker process was killed.*smaller num_workers"):
        write_shards(tmp_path, range(4), killed, num_workers=2)


def killed(numbers):
    os.kill(os.getpid(), signal.SIGKILL)


def test_rerun_with_equal_arguments_changes_nothing(tmp_path):
    index = write_set(tmp_path)
    before = {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()}
    assert write_set(tmp_path) == index
    assert {p.name: p.stat().st_mtime_ns for p in tmp_path.iterdir()} == before


def test_rerun_with_other_arguments_needs_overwrite(tmp_path):
    write_set(tmp_path)
    with pytest.raises(ShardError, match="overwrite"):
        write_set(tmp_path, count=5)
    assert ShardIndex.load(tmp_path).num_samples == 9
    assert write_set(tmp_path, count=2, overwrite=True).num_samples == 2
    assert sorted(os.listdir(tmp_path)) == [INDEX_NAME, "shard-000000.tar"]


def test_rerun_finds_a_damaged_shard(tmp_path):
    index = write_set(tmp_path)
    content = bytearray(index.paths[1].read_bytes())
    content[600] ^= 1
    index.paths[1].write_bytes(content)
    with pytest.raises(ShardError, match=r"shard-000001\.tar does not match its checksum"):
        write_set(tmp_path)


def test_interrupted_run_is_replaced_on_request_but_foreign_files_are_not(tmp_path):
    start_set(tmp_path, {"by": "hand"}, overwrite=False)
    (tmp_path / "shard-000000.tar").write_bytes(b"finished shard of an interrupted run")
    (tmp_path / ".shard-000001.tar.tmp").write_bytes(b"half")
    with pytest.raises(
        ShardError, match="unfinished.* other arguments: by='hand' instead of None, count=.* overwrite=true"
    ):
        write_set(tmp_path)
    assert (tmp_path / "shard-000000.tar").exists()
    assert write_set(tmp_path, overwrite=True).num_samples == 9
    assert PARTIAL_NAME not in os.listdir(tmp_path)

    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "shard-000000.tar").write_bytes(b"not ours: no index, no mark of a run")
    for overwrite in (False, True):
        with pytest.raises(ShardError, match="choose an empty folder"):
            write_set(foreign, overwrite=overwrite)
    assert (foreign / "shard-000000.tar").read_bytes().startswith(b"not ours")


@pytest.mark.parametrize("key", ["", "a.b", "__x", "/abs", "caf\udce9"])
def test_keys_that_webdataset_would_misread_are_refused(tmp_path, key):
    with pytest.raises(ShardError, match="sample key"):
        write_shard(tmp_path / "s.tar", [Sample(key, {"txt": b""})])
    assert not list(tmp_path.iterdir())


def test_patterns_lists_and_single_shards(tmp_path):
    for name in ("a", "b"):
        write_set(tmp_path / name)
    assert len(load_indices(str(tmp_path / "{a,b}"))) == 2
    assert len(load_indices(str(tmp_path / "*"))) == 2
    assert len(load_indices([str(tmp_path / "a"), str(tmp_path / "b" / INDEX_NAME)])) == 2
    (part,) = load_indices(str(tmp_path / "a" / "shard-{000000,000002}.tar"))
    assert [s.count for s in part.shards] == [3, 3]


@pytest.mark.parametrize("name", ["[2024] x/out", "{a,b}/out", "[2024]", "*", "x #1: 'y'.tar"])
def test_paths_with_any_characters_are_read_back(tmp_path, monkeypatch, capsys, name):
    monkeypatch.chdir(tmp_path)
    for number in range(2):
        (tmp_path / "src").mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / "src" / f"{number}.png")
    main(["data", "folder", "src", name, "--num-workers", "1"])
    (index,) = load_indices(name)
    assert index == load_indices(f"{name}/*.tar")[0] == load_indices([f"{name}/shard-{{000000..000000}}.tar"])[0]
    main(["data", "verify", name, "--num-workers", "1"])
    main(["data", "stats", name, "--num-workers", "1"])
    assert "0 errors" in capsys.readouterr().out
    main(["data", "reshard", name, f"again/{name}", "--num-workers", "1"])
    for source in (name, f"again/{name}"):
        loader, count = open_pictures(source, image_size=8)
        assert count == 2 and len(next(iter(loader))["key"]) == 2


def test_sets_of_different_kinds_are_not_mixed(tmp_path):
    write_set(tmp_path / "a")
    other = ShardIndex.load(tmp_path / "a")
    shard = write_shard(_made(tmp_path / "b") / "shard-000000.tar", [Sample("k", {"txt": b"t"})])
    write_index(ShardIndex(tmp_path / "b", ("text",), (shard,)))
    with pytest.raises(ShardError, match="differ in fields"):
        load_indices([str(other.folder), str(tmp_path / "b")])


def _made(folder):
    folder.mkdir()
    return folder
