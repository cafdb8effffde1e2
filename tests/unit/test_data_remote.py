"""Sets at URLs and behind commands: the same samples, every one, whatever the network does."""

import json
import multiprocessing
import shutil
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest
from PIL import Image

from flextok_pl.cli import main
from flextok_pl.data import ShardDataModule, ShardError, write_folder
from flextok_pl.data.shards import remote as remote_module
from flextok_pl.data.shards.index import INDEX_NAME
from flextok_pl.data.shards.sources import load_indices


class Server(ThreadingHTTPServer):
    """Serves a folder; `faults` holds for a file name what goes wrong with the next requests of it."""

    def __init__(self, folder):
        self.faults, self.asked = {}, []
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(SimpleHTTPRequestHandler):
    def do_GET(self):
        name = self.path.rpartition("/")[2]
        self.server.asked.append(name)
        faults = self.server.faults.get(name, [])
        fault = faults.pop(0) if faults else None
        if isinstance(fault, int):
            return self.send_error(fault)
        file = Path(self.translate_path(self.path))
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        self.send_response(200)
        if fault == "short":  # a proxy that gives up in the middle, and says so to nobody
            content = content[: len(content) // 2]
        if fault == "changed":
            content = content[:-1] + b"x"
        if fault == "slow":
            time.sleep(0.5)
        self.send_header("Content-Length", len(content))
        self.end_headers()
        if fault == "cut":
            content = content[:100]
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """13 pictures in 3 shards."""
    source, root = tmp_path_factory.mktemp("pictures"), tmp_path_factory.mktemp("web")
    for i in range(13):
        Image.new("RGB", (8, 8), (i, i, i)).save(source / f"p{i:02d}.png")
    write_folder(source, root / "set", num_workers=0, samples_per_shard=5)
    return root


@pytest.fixture
def server(folder, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(remote_module, "PAUSES", (0.0, 0.0))
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def module(source, **options):
    return ShardDataModule(source, source, **{"image_size": 8, "batch_size": 2, "num_workers": 0, **options})


def keys(loader):
    return [key for batch in loader for key in batch["key"]]


@pytest.mark.parametrize("cache", [False, True])
@pytest.mark.parametrize("num_workers", [0, 2, 5])
def test_http_delivers_what_the_folder_does(server, folder, tmp_path, cache, num_workers):
    local = module(str(folder / "set"), num_workers=num_workers)
    data = module(f"{server.url}/set/", num_workers=num_workers, cache_dir=str(tmp_path) if cache else None)
    data.setup("fit")
    assert server.asked == [INDEX_NAME] * 2  # nothing is asked of the shards
    assert keys(data.train_dataloader()) == keys(local.train_dataloader())
    assert keys(data.val_dataloader()) == keys(local.val_dataloader()) and len(keys(data.val_dataloader())) == 13
    assert data.data_hash("val") == local.data_hash("val")
    if cache:
        assert sorted(server.asked) == [INDEX_NAME, INDEX_NAME, *(f"shard-{i:06d}.tar" for i in range(3))]
        server.asked.clear()
        assert keys(module(f"{server.url}/set", cache_dir=str(tmp_path)).val_dataloader())  # a later run
        assert server.asked == [INDEX_NAME]
        (kept,) = tmp_path.iterdir()
        assert sorted(path.name for path in kept.iterdir()) == [f"shard-{i:06d}.tar" for i in range(3)]


def test_other_file_systems_commands_and_patterns(folder, tmp_path):
    files = fsspec.filesystem("memory")
    files.put(str(folder / "set"), "/bucket/set", recursive=True)
    expected = keys(module(str(folder / "set")).val_dataloader())
    command = f"pipe:cat {folder}/set/{{name}}"
    for source in ("memory://bucket/set", f"memory://bucket/set/{INDEX_NAME}", command, [command]):
        assert keys(module(source).val_dataloader()) == expected
    assert len(load_indices("memory://bucket/{set,set}")) == 2
    (part,) = load_indices("memory://bucket/set/shard-{000000,000002}.tar")
    assert [shard.count for shard in part.shards] == [5, 4]
    with pytest.raises(ShardError, match="has no shard shard-000009.tar"):
        load_indices("memory://bucket/set/shard-000009.tar")
    files.rm("/bucket", recursive=True)
    with pytest.raises(ShardError, match="is not a folder on this machine"):
        load_indices(command)[0].paths  # noqa: B018


@pytest.mark.parametrize("fault", [503, "short", "cut", "changed"])
@pytest.mark.parametrize("cache", [False, True])
def test_a_fault_that_passes_is_tried_again(server, tmp_path, caplog, fault, cache):
    server.faults = {"shard-000001.tar": [fault, fault], INDEX_NAME: [503]}
    data = module(f"{server.url}/set", cache_dir=str(tmp_path) if cache else None)
    assert len(keys(data.val_dataloader())) == 13
    assert server.asked.count("shard-000001.tar") == 3
    assert "shard-000001.tar" in caplog.text and "again in" in caplog.text


@pytest.mark.parametrize(
    "fault, message, num_workers",
    [
        (503, "503", 0),
        (503, "503", 1),
        ("short", r"bytes arrived instead of the [\d,]+ in the index", 0),
        ("cut", "not completed", 0),
        ("changed", "SHA-256", 0),
    ],
)
def test_a_fault_that_stays_names_url_and_remedy(server, tmp_path, fault, message, num_workers):
    server.faults = {"shard-000001.tar": [fault] * 99}
    data = module(f"{server.url}/set", cache_dir=str(tmp_path), num_workers=num_workers)
    with pytest.raises(ShardError, match=rf"{server.url}/set/shard-000001.tar cannot be fetched.*{message}.*check the"):
        keys(data.val_dataloader())
    assert server.asked.count("shard-000001.tar") == 3
    assert not list(tmp_path.rglob("shard-000001.tar"))
    server.faults.clear()
    assert len(keys(module(f"{server.url}/set", cache_dir=str(tmp_path)).val_dataloader())) == 13
    assert not list(tmp_path.rglob("*.part"))


@pytest.mark.parametrize(
    "source, message",
    [
        ("{url}/nowhere", "nowhere/index.json cannot be fetched.*FileNotFoundError"),
        ("{url}/*", "must not contain"),
        ("{url}/set?sig=1", "must not contain .*pipe:curl"),
        ("pipe:cat index.json", "does not use the name"),
        ("pipe:echo {name} is lost >&2; exit 3", "exit code 3, index.json is lost"),
        ("pipe:true {name}", "is damaged"),
        ("nonsense://set", "Protocol not known"),
    ],
)
def test_sources_that_are_none(server, source, message):
    with pytest.raises(ShardError, match=message):
        module(source.replace("{url}", server.url)).setup("fit")
    assert len(server.asked) <= 1  # what is not there is asked for once


@pytest.mark.parametrize("name", ["$(touch ran).tar", "a b.tar", "../x.tar", "x?y.tar", "-x.tar"])
def test_names_of_a_hostile_index_reach_no_command(folder, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(folder / "set", tmp_path / "set")
    record = json.loads((tmp_path / "set" / INDEX_NAME).read_text())
    record["shards"][0]["name"] = name
    (tmp_path / "set" / INDEX_NAME).write_text(json.dumps(record))
    with pytest.raises(ShardError, match="shard name"):
        load_indices("pipe:cat set/{name}")
    assert not (tmp_path / "ran").exists()


def fetch_all(source, cache, barrier):
    (index,) = load_indices(source, cache)
    barrier.wait()
    for number in range(len(index.shards)):
        index.open(number).close()
    index.verify()


def test_processes_share_the_cache(server, tmp_path):
    server.faults = {"shard-000000.tar": ["slow"]}
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(4)
    processes = [context.Process(target=fetch_all, args=(f"{server.url}/set", tmp_path, barrier)) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    assert all(server.asked.count(f"shard-{i:06d}.tar") == 1 for i in range(3))
    assert not list(tmp_path.rglob(".*"))


def test_a_damaged_cache_is_filled_again_and_a_full_disk_is_named(server, tmp_path, monkeypatch):
    (index,) = load_indices(f"{server.url}/set", tmp_path / "cache")
    index.open(0).close()
    path = index.folder / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:1000])
    (index.folder / ".shard-000001.tar.elsewhere.part").write_bytes(b"of a killed process")
    index.verify()
    (tmp_path / "file").write_text("")
    with pytest.raises(ShardError, match="cache_dir=.*cannot be kept"):
        load_indices(f"{server.url}/set", tmp_path / "file")[0].open(0)


def test_fit_and_test_from_urls(tmp_path, monkeypatch, image_shards):
    """Through the front door, two weighted sets in training, with the cache that the test after it finds filled."""
    experiment = Path("experiments/tokenizer/tiny.yaml").absolute()
    monkeypatch.chdir(tmp_path)
    url, command = f"file://{image_shards}/train", f"pipe:cat {image_shards}/train/{{name}}"
    data = {"train": [url, command], "train_weights": [3, 1], "val": f"file://{image_shards}/val"}
    data |= {"cache_dir": "cache", "fast_decode": True, "on_error": "skip"}
    Path("data.yaml").write_text(json.dumps({"data": data, "trainer": {"enable_progress_bar": False}}))
    options = ["--config", str(experiment), "--config", "data.yaml"]
    main(["fit", *options, "--trainer.max_steps", "2", "--model.warmup_steps=0"])
    assert len(list(Path("cache").glob("*/*.tar"))) == 2  # both training sets are the same one, which is kept once
    (tokenizer,) = Path("runs").rglob("tokenizer.safetensors")
    with monkeypatch.context() as patch:
        patch.setattr(remote_module.Remote, "_fetch", _only_indices(remote_module.Remote._fetch))
        main(["test", *options, "--tokenizer", str(tokenizer)])


def _only_indices(real):
    def fetch(self, name, target, shard):
        assert shard is None, f"{name} is in the cache"
        real(self, name, target, shard)

    return fetch
