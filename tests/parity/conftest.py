"""A golden set, in the folder that a module names `GOLDEN`, and the tokenizer of it."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flextok_pl.models.tokenizer import FlexTok


@pytest.fixture(scope="module", params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def golden(request: pytest.FixtureRequest, device: str) -> dict[str, Tensor]:
    with np.load(request.module.GOLDEN / "golden.npz") as arrays:
        return {name: torch.from_numpy(arrays[name]).to(device) for name in arrays.files}


@pytest.fixture(scope="module")
def tokenizer(request: pytest.FixtureRequest, device: str) -> FlexTok:
    folder = request.module.GOLDEN
    return FlexTok.from_pretrained(folder / "model.safetensors", vae_config=folder / "vae_config.json", device=device)
