"""Converters killed at any time: what is complete is kept, and the set is that of an undisturbed run."""

import hashlib
import multiprocessing
import os
import signal
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tqdm import tqdm

from flextok_pl.data import write_folder, write_resharded
from flextok_pl.data.convert import conversion
from flextok_pl.data.shards.index import INDEX_NAME, ShardIndex
from flextok_pl.data.shards.tars import tar_samples

NUM_PICTURES, BROKEN = 60, 17


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Pictures in two classes, one of them broken."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(NUM_PICTURES):
        file = folder / "ab"[i % 2] / f"{i}.jpg"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (300, 200 + i, 3), dtype=np.uint8)).save(file)
    broken = folder / "ab"[BROKEN % 2] / f"{BROKEN}.jpg"
    broken.write_bytes(broken.read_bytes()[:2000])
    return folder


def run(kind, source, dst, log):
    """Convert with two workers, and note process and content of each picture that is decoded."""
    real, file = conversion.decode_image, os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def decode(data):
        os.write(file, f"{os.getpid()} {hashlib.sha256(data).hexdigest()}\n".encode())
        time.sleep(0.02)  # so that a busy machine does not miss the moment
        return real(data)

    options = {"size": 150, "on_error": "skip", "num_workers": 2, "samples_per_shard": 5}
    conversion.decode_image = decode
    try:
        if kind == "folder":
            write_folder(source, dst, **options)
        else:
            write_resharded(str(source), dst, **options)
    finally:
        conversion.decode_image = real
        os.close(file)


def run_apart(*arguments):
    """As `run`, in a forked process, which must not be killed while it holds a lock that it shares with this one."""
    tqdm.set_lock(threading.RLock())
    run(*arguments)


def killed(kind, source, dst, log, complete, delay):
    """Run in a process of its own, killed some seconds after so many shards are complete."""
    process = multiprocessing.get_context("fork").Process(target=run_apart, args=(kind, source, dst, log))
    process.start()
    while process.is_alive() and len(shards(dst)) < complete:
        time.sleep(0.001)
    time.sleep(delay)
    process.kill()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, "it was through before it was killed"


def shards(folder):
    return {path.name: path.stat().st_mtime_ns for path in folder.glob("shard-*.tar")}


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def log_lines(log):
    return [line.split() for line in log.read_text().splitlines()] if log.exists() else []


def is_running(pid):
    status = Path(f"/proc/{pid}/stat")
    try:
        return status.read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("kind", ["folder", "reshard"])
def test_killed_at_several_moments(source, tmp_path, kind, seed):
    if kind == "reshard":
        write_folder(source, tmp_path / "set", on_error="skip", num_workers=1, samples_per_shard=20)
        source = tmp_path / "set"
    whole, folder, log = tmp_path / "whole", tmp_path / "killed", tmp_path / "log"
    run(kind, source, whole, tmp_path / "whole.log")
    rng = np.random.default_rng(seed)
    before: dict[str, int] = {}
    for least in (0, 3, 6):  # of 12 shards
        killed(kind, source, folder, log, max(least, len(before)), rng.uniform(0, 0.1))
        deadline = time.monotonic() + 10
        while any(is_running(pid) for pid, _ in log_lines(log)):
            assert time.monotonic() < deadline, "a worker lives on, and would write beside the next run"
            time.sleep(0.01)
        after = shards(folder)
        assert before.items() <= after.items() and not (folder / INDEX_NAME).exists()
        before = after
    done = len(log_lines(log))
    run(kind, source, folder, log)
    assert contents(folder) == contents(whole)
    assert before.items() <= shards(folder).items(), "complete shards are not made again"
    index = ShardIndex.load(folder)
    index.verify()
    number = len(log_lines(tmp_path / "whole.log"))
    assert index.num_samples == NUM_PICTURES - 1 and number == (NUM_PICTURES if kind == "folder" else NUM_PICTURES - 1)
    kept = sum(shard.count for shard in index.shards if shard.name in before)
    # The broken picture is tried again, unless it lies in a complete shard.
    assert number - len(log_lines(log)[done:]) - kept in (0, 1)
    keys = [key for path in index.paths for key, _ in tar_samples(folder, path.name)]
    assert len(set(keys)) == len(keys) == NUM_PICTURES - 1
