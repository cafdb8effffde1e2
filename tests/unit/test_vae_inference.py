"""The autoencoder's own pass on a CPU: diffusers' function for every architecture, and only where it may stand in."""

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL

from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.layers import winograd
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models import vae_inference
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE

WIDE = VAEConfig(latent_channels=4, block_out_channels=(128, 128), layers_per_block=1)
ARCHITECTURES = {
    "small": WIDE,
    "published": VAEConfig(),
    "widths": VAEConfig(block_out_channels=(64, 160, 128), norm_num_groups=16, latent_channels=3),
    "bare": VAEConfig(
        block_out_channels=(128, 256),
        layers_per_block=1,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
    ),
    "flat": VAEConfig(block_out_channels=(128,), norm_num_groups=64, layers_per_block=3),
}


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """What parts ran in the pass under test, which takes small images, too; diffusers' is not there."""
    made: list[str] = []
    for name in ("encode", "decode"):
        original = getattr(vae_inference._Pass, name)

        def spied(self: Any, *arguments: Any, name: str = name, original: Any = original) -> Any:
            made.append(name)
            return original(self, *arguments)

        monkeypatch.setattr(vae_inference._Pass, name, spied)
    monkeypatch.setattr(vae_inference, "FEWEST_PIXELS", 1)
    yield made


def network_and_inputs(config: VAEConfig, height: int = 32, width: int = 48) -> tuple[AutoencoderKL, Any, Any]:
    """A network of random weights, two images and two latents."""
    torch.manual_seed(0)
    network, factor = VAE(config).eval().requires_grad_(False).network, config.downsampling
    images = torch.rand(2, 3, height, width) * 2 - 1
    return network, images, torch.randn(2, config.latent_channels, height // factor, width // factor)


def close(ours: torch.Tensor, theirs: torch.Tensor, share: float) -> None:
    """Equal to a share of the largest value."""
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() <= share * theirs.abs().max()


@pytest.mark.parametrize("name", sorted(ARCHITECTURES))
@pytest.mark.parametrize(("height", "width"), [(32, 48), (16, 40)])  # at 40 some levels are no multiples of 4
@torch.no_grad()
def test_the_function_of_diffusers(
    name: str, height: int, width: int, calls: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Measured in float32 were up to 7e-6 of the largest value, and 8e-6 by diffusers with channels last in memory."""
    monkeypatch.setattr(winograd, "FEWEST_POSITIONS", 1)
    network, images, latents = network_and_inputs(ARCHITECTURES[name], height, width)
    kept = images.clone(), latents.clone()
    wide = copy.deepcopy(network).double()
    moments, decoded = wide._encode(images.double()), wide.decode(latents.double()).sample
    close(vae_inference.encode(wide, images.double()), moments, 1e-12)
    close(vae_inference.decode(wide, latents.double()), decoded, 1e-12)
    close(vae_inference.encode(network, images), moments, 2e-5)
    close(vae_inference.decode(network, latents), decoded, 2e-5)
    assert calls == ["encode", "decode"] * 2
    assert torch.equal(images, kept[0]) and torch.equal(latents, kept[1])


@torch.no_grad()
def test_images_do_not_depend_on_each_other(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    network, images, latents = network_and_inputs(WIDE)
    moments, decoded = vae_inference.encode(network, images), vae_inference.decode(network, latents)
    close(vae_inference.encode(network, images[1:]), moments[1:], 1e-6)
    close(vae_inference.decode(network, latents[1:]), decoded[1:], 1e-6)
    calls.clear()
    monkeypatch.setattr(vae_inference, "PIXELS_AT_A_TIME", 32 * 48)
    close(vae_inference.encode(network, images), moments, 1e-6)
    close(vae_inference.decode(network, latents), decoded, 1e-6)
    assert calls == ["encode"] * 2 + ["decode"] * 2


@torch.no_grad()
def test_tokens_are_those_of_diffusers_pass(monkeypatch: pytest.MonkeyPatch, calls: list[str]) -> None:
    torch.manual_seed(0)
    options = {"encoder_width": 64, "encoder_depth": 1, "decoder_width": 64, "decoder_depth": 1, "repa_layer": None}
    config = FlexTokConfig(vae=WIDE, latent_channels=4, num_registers=16, grid_size=(8, 8), **options)
    tokenizer, images = FlexTok(config).eval(), torch.rand(8, 3, 32, 32) * 2 - 1
    tokens = tokenizer.tokenize(images)
    assert calls
    monkeypatch.setattr(vae_inference, "_serves", lambda *_: False)
    assert torch.equal(tokens, tokenizer.tokenize(images))
    assert len(tokens.unique()) > 16


def test_weights_may_change_between_calls(calls: list[str]) -> None:
    """As weights do in a training that validates, and when an average of them is put in their place."""
    network, images, _ = network_and_inputs(WIDE)
    other = network_and_inputs(WIDE)[0]
    with torch.no_grad():
        vae_inference.encode(network, images)
        for parameter in other.parameters():
            parameter.mul_(1.1)
        for parameter, changed in zip(network.parameters(), other.parameters(), strict=True):
            parameter.data.copy_(changed)
        close(vae_inference.encode(network, images), other._encode(images), 2e-5)
    assert calls == ["encode"] * 2


@torch.no_grad()
def test_small_images_take_diffusers_pass(calls: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    network, images, latents = network_and_inputs(WIDE)
    monkeypatch.setattr(vae_inference, "FEWEST_PIXELS", 32 * 48 + 1)
    assert torch.equal(vae_inference.encode(network, images), network._encode(images))
    assert torch.equal(vae_inference.decode(network, latents), network.decode(latents).sample)
    assert calls == []


def test_gradients_take_diffusers_pass(calls: list[str]) -> None:
    network, images, latents = network_and_inputs(WIDE)
    frozen = vae_inference.encode(network, images)  # nothing to learn
    assert calls == ["encode"] and not frozen.requires_grad
    vae_inference.decode(network, latents.requires_grad_()).sum().backward()
    assert latents.grad is not None
    network.requires_grad_(True)
    vae_inference.encode(network, images).sum().backward()
    assert network.encoder.conv_in.weight.grad is not None
    assert calls == ["encode"]
    with torch.no_grad():
        vae_inference.encode(network, images)
    with torch.inference_mode():
        vae_inference.encode(network, images)
    assert calls == ["encode"] * 3


@torch.no_grad()
def test_what_the_pass_does_not_know_is_diffusers(calls: list[str]) -> None:
    network, images, _ = network_and_inputs(WIDE)
    narrow = network_and_inputs(VAEConfig(block_out_channels=(32, 64), latent_channels=4))[0]
    others = [network_and_inputs(VAEConfig(block_out_channels=(128, 128), latent_channels=4, act_fn="relu"))[0], narrow]
    for other in others:
        close(vae_inference.encode(other, images), other._encode(images), 2e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert vae_inference.encode(network, images).dtype == torch.bfloat16
    network.enable_slicing()
    vae_inference.encode(network, images)
    assert calls == []


@torch.no_grad()
def test_a_frozen_autoencoder_takes_the_pass(calls: list[str]) -> None:
    _, images, _ = network_and_inputs(WIDE)
    vae = Frozen(VAE(WIDE))
    with torch.enable_grad():
        latents = vae.encode(images)
        images = vae.decode(latents)
    assert calls == ["encode", "decode"] and not images.requires_grad
