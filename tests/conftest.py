"""Fixtures shared by the tests. Nothing here or in any test reaches the network."""

import os
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub

import numpy as np
import pytest
import torch
from PIL import Image

from flextok_pl.data import write_folder

torch.set_num_threads(1)  # the tests' models are too small to share between threads


@pytest.fixture(autouse=True)
def _own_home(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Caches of a test stay in its own place."""
    monkeypatch.setenv("HOME", str(tmp_path_factory.getbasetemp() / "home"))


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
