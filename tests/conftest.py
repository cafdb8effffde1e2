"""Fixtures shared by the tests. Nothing here or in any test reaches the network."""

import gc
import multiprocessing
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Before torch is imported, here or in a child process: the tests' models are too small for several threads, and waiting
# threads slow down a busy machine.
os.environ["OMP_NUM_THREADS"] = "1"

import lightning.pytorch  # noqa: F401  now: its log goes to the stderr at the time of its import
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import _utils

from flextok_pl.cli import main
from flextok_pl.config import FlexTokConfig
from flextok_pl.data import write_folder
from flextok_pl.data.convert.demo import render
from flextok_pl.data.convert.openmoji import list_pictures
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.sweeps.sweep import as_arguments

gc.freeze()  # imports leave no garbage, and searching for it would take a sixth of the tests' time
_utils.MP_STATUS_CHECK_INTERVAL = 0.5  # seconds that torch waits for loader processes after an error


def pytest_configure(config: pytest.Config) -> None:
    """Hide GPUs without `-m gpu`: other tests expect a CPU's values, and start more processes than there are GPUs."""
    if "gpu" not in config.option.markexpr:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def pytest_unconfigure() -> None:
    gc.unfreeze()  # or nanobind reports leaks


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device and -m gpu")


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the caches of tests in their own folder."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))


SHARED_THREADS = ("tqdm_monitor", "fsspecIO", "asyncio_")
"""Beginnings of the names of threads that a library starts once per process."""


def _running() -> set[str]:
    """The threads and the living child processes of this process."""
    found = {f"thread {t.name} {t.ident}" for t in threading.enumerate() if not t.name.startswith(SHARED_THREADS)}
    for children in Path("/proc/self/task").glob("*/children"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            for pid in children.read_text().split():
                name, _, rest = Path("/proc", pid, "stat").read_text().partition("(")[2].rpartition(")")
                if not rest.startswith(" Z"):
                    found.add(f"process {name} {pid}")
    return found


@pytest.fixture(autouse=True)
def _nothing_left_behind() -> Iterator[None]:
    """Check that a test ends the threads and processes that it has started."""
    before = _running()
    yield
    for _ in range(100):  # a busy machine may end them late
        left = _running() - before
        if not left:
            return
        gc.collect()  # ends a loader that the traceback of an error holds
        time.sleep(0.05)
    pytest.fail(f"left behind: {', '.join(sorted(left))}")


@pytest.fixture
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute convolutions on a GPU in float32; by default cuDNN uses TF32."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(scope="session")
def golden_dir() -> Path:
    """The official model's weights, inputs and outputs at tiny size."""
    return Path(__file__).parent / "parity" / "golden" / "flextok_a"


@pytest.fixture(scope="session")
def image_shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `train` and `val`: 40 pictures of 32 px, coloured squares on white, in two classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(40):
        pixels = np.full((32, 32, 3), 255, np.uint8)
        top, left = rng.integers(0, 16, 2)
        pixels[top : top + 16, left : left + 16] = rng.integers(0, 256, 3)
        file = folder / ("left" if left < 8 else "right") / f"{i:03d}.png"
        file.parent.mkdir(exist_ok=True)
        Image.fromarray(pixels).save(file)
    shards = tmp_path_factory.mktemp("shards")
    write_folder(folder, shards, val_fraction=0.4, num_workers=1)
    return shards


TINY = Path(__file__).parents[1] / "experiments" / "tokenizer" / "tiny.yaml"
Arguments = Callable[..., list[str]]


@pytest.fixture(scope="session")
def tiny(image_shards: Path) -> Arguments:
    """Makes the arguments of a command on the tiny experiment and `image_shards`; options have dotted names."""

    def arguments(command: str, options: Mapping[str, Any] | None = None, *more: str) -> list[str]:
        given = {f"data.{part}": str(image_shards / part) for part in ("train", "val")}
        given |= {"trainer.enable_progress_bar": False, "trainer.enable_model_summary": False}
        given |= {"model.warmup_steps": 0} if command == "fit" else {}
        return [command, f"--config={TINY}", *as_arguments(given | dict(options or {})), *more]

    return arguments


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The file of a tokenizer of the tiny experiment before any training."""
    return FlexTok(FlexTokConfig.preset("tiny")).save_pretrained(tmp_path_factory.mktemp("tiny") / "tiny.safetensors")


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of torch-fidelity's Inception at random, with random batch statistics."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    generator = torch.Generator().manual_seed(0)
    state = {}
    skeleton = FeatureExtractorInceptionV3.__new__(FeatureExtractorInceptionV3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            FeatureExtractorInceptionV3, "load_state_dict", lambda self, given: state.update(self.state_dict())
        )
        patch.setattr("torch_fidelity.feature_extractor_inceptionv3.torch.load", lambda *a, **k: {})
        skeleton.__init__("inception-v3-compat", ["2048"], feature_extractor_weights_path="unused")
    for name, tensor in state.items():
        if name.endswith("conv.weight"):
            fan_in = tensor[0].numel()
            state[name] = torch.randn(tensor.shape, generator=generator) * (2 / fan_in) ** 0.5
        elif name.endswith("running_mean"):
            state[name] = torch.randn(tensor.shape, generator=generator) * 0.1
    torch.save(state, path)
    return path


@pytest.fixture(scope="session")
def emoji_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `a` and `b`: 24 different OpenMoji pictures of 48 px each, as PNG."""
    folder = tmp_path_factory.mktemp("emoji")
    files, _ = render(list_pictures()[::90][:48], 48, 0)
    for i, data in enumerate(files):
        file = folder / "ab"[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
    return folder


Ranks = Callable[..., list[BaseProcess]]


@pytest.fixture
def start_ranks() -> Iterator[Ranks]:
    """Starts the processes of a `flextok` command, in a folder, as torchrun would; the test's end kills them."""
    started: list[BaseProcess] = []

    def start(
        folder: Path, world_size: int, arguments: list[str], prepare: Callable[[int], object] | None = None
    ) -> list[BaseProcess]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]

        def child(rank: int) -> None:
            os.chdir(folder)
            if world_size > 1:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "GROUP_RANK": "0"}
                os.environ |= {"WORLD_SIZE": str(world_size), "LOCAL_WORLD_SIZE": str(world_size)}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "test"}
            if prepare is not None:
                prepare(rank)
            main(arguments)

        ranks = [multiprocessing.get_context("fork").Process(target=child, args=(r,)) for r in range(world_size)]
        for process in ranks:
            process.start()
        started.extend(ranks)
        return ranks

    yield start
    for process in started:
        process.kill()
        process.join()
