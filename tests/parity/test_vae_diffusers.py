"""The VAE against the official model's recorded latents and images, and against diffusers itself."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file

from flextok_pl.config import VAEConfig
from flextok_pl.interop.autoencoder import vae_config_from_diffusers
from flextok_pl.models.vae import VAE

GOLDEN = Path(__file__).parent / "golden" / "flextok_a"
CLOSE = {"atol": 3e-5, "rtol": 3e-5}  # on a CPU our channels are last in memory, and sums are in another order


@pytest.fixture(scope="module")
def golden() -> dict[str, torch.Tensor]:
    with np.load(GOLDEN / "golden.npz") as arrays:
        return {k: torch.from_numpy(arrays[k]) for k in ("images", "vae_latents", "vae_decode_of_latents")}


@pytest.fixture(scope="module")
def model() -> VAE:
    config = vae_config_from_diffusers(json.loads((GOLDEN / "vae_config.json").read_text()))
    model = VAE(config).rescaled(json.loads((GOLDEN / "meta.json").read_text())["set"]["scaling_factor"])
    weights = load_file(GOLDEN / "model.safetensors")
    model.load_state_dict({k.removeprefix("vae."): v for k, v in weights.items() if k.startswith("vae.")})
    return model.eval()


@torch.no_grad()
def test_latents_are_the_official_ones(model: VAE, golden: dict[str, torch.Tensor]) -> None:
    torch.testing.assert_close(model.encode(golden["images"]), golden["vae_latents"], **CLOSE)


@torch.no_grad()
def test_images_are_the_official_ones(model: VAE, golden: dict[str, torch.Tensor]) -> None:
    ours = model.decode(golden["vae_latents"])
    torch.testing.assert_close(ours, golden["vae_decode_of_latents"], **CLOSE)


@torch.no_grad()
def test_posterior_is_diffusers_one(model: VAE, golden: dict[str, torch.Tensor]) -> None:
    theirs = model.network.encode(golden["images"]).latent_dist
    mean, log_variance = model.moments(golden["images"]).chunk(2, dim=1)
    torch.testing.assert_close(mean, theirs.mode(), **CLOSE)
    torch.testing.assert_close(log_variance, theirs.logvar, **CLOSE)
    sample = model.encode(golden["images"], sample_posterior=True, generator=torch.Generator().manual_seed(3))
    expected = theirs.sample(torch.Generator().manual_seed(3)) * 0.88
    torch.testing.assert_close(sample, expected, **CLOSE)


@torch.no_grad()
def test_diffusers_reads_what_we_write(model: VAE, golden: dict[str, torch.Tensor], tmp_path: Path) -> None:
    model.save_pretrained(tmp_path / "vae")
    theirs = AutoencoderKL.from_pretrained(str(tmp_path / "vae"))
    assert theirs.config.scaling_factor == 0.88
    images = golden["images"][:1]
    latents = theirs.encode(images).latent_dist.mode() * 0.88
    torch.testing.assert_close(model.encode(images), latents, **CLOSE)
    ours = VAE.from_pretrained(tmp_path / "vae")
    assert ours.config == model.config
    assert torch.equal(ours.encode(images), model.encode(images))


def test_published_size() -> None:
    with torch.device("meta"):
        model = VAE(VAEConfig())
    assert sum(p.numel() for p in model.parameters()) == 83_821_011
    assert all(p.is_meta for p in model.parameters())
