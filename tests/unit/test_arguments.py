"""What the models are given: every type either works or is refused in words."""

import copy
import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.models.arguments import IMAGE_LIMIT
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE

CONFIG = dataclasses.replace(FlexTokConfig.preset("tiny"), fsq_levels=(8, 8, 8, 5, 5, 5))  # 64,000 ids
K, V = CONFIG.num_registers, 64_000


@pytest.fixture(scope="module")
def tok() -> FlexTok:
    torch.manual_seed(0)
    tok = FlexTok(CONFIG)
    torch.nn.init.normal_(tok.decoder.head.proj.weight, std=0.1)
    return tok


@pytest.fixture(scope="module")
def prior() -> Prior:
    torch.manual_seed(0)
    return Prior(PriorConfig(num_classes=4, vocab_size=300, num_tokens=8, depth=1, width=32, head_dim=16))


@pytest.fixture
def images(tok: FlexTok) -> Tensor:
    side = min(tok.latent_size) * tok.require_vae().config.downsampling
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(0)) * 2 - 1


def decoded(tok: FlexTok, tokens: Any, **options: Any) -> Tensor:
    return tok.detokenize(tokens, **{"num_steps": 1, "generator": torch.Generator().manual_seed(0), **options})


STORED = {
    "uint8": lambda tokens: tokens.to(torch.uint8),
    "int16": lambda tokens: tokens.to(torch.int16),
    "uint16, as token shards store them": lambda tokens: tokens.to(torch.uint16),
    "int32": lambda tokens: tokens.to(torch.int32),
    "numpy": lambda tokens: tokens.numpy().astype(np.uint16),
    "lists": lambda tokens: [row.to(torch.uint16) for row in tokens],
    "lists of (1, k), as the published code has them": lambda tokens: list(tokens.split(1)),
    "numpy lists": lambda tokens: list(tokens.numpy()),
}


@pytest.mark.parametrize("name", STORED)
def test_integer_types_of_tokens(tok: FlexTok, name: str) -> None:
    tokens = torch.randint(127, (2, 5), generator=torch.Generator().manual_seed(0))
    given = STORED[name](tokens)
    assert torch.equal(decoded(tok, given), decoded(tok, tokens))
    assert torch.equal(decoded(tok, given, num_tokens=np.int64(3)), decoded(tok, tokens, num_tokens=3))
    ragged = torch.tensor([2, 5], dtype=torch.uint8)
    assert torch.equal(decoded(tok, given, num_tokens=ragged), decoded(tok, tokens, num_tokens=ragged.long()))
    if isinstance(given, Tensor):
        assert torch.equal(tok.quantizer.tokens_to_codes(given), tok.quantizer.tokens_to_codes(tokens))


def test_integer_types_of_a_prior(prior: Prior) -> None:
    tokens, classes = torch.tensor([[3, 200]]), torch.tensor([2])
    for kind in (torch.uint8, torch.uint16, torch.int32):
        torch.testing.assert_close(prior(tokens.to(kind), classes.to(kind)), prior(tokens, classes))
        drawn = prior.generate(classes.to(kind), 4, prefix=tokens.to(kind))
        assert torch.equal(drawn[:, :2], tokens) and drawn.dtype == torch.int64


@pytest.mark.parametrize(
    "convert",
    [Tensor.double, Tensor.half, Tensor.bfloat16, lambda x: x.numpy(), lambda x: x.double().numpy()],
    ids=["float64", "float16", "bfloat16", "numpy", "numpy float64"],
)
def test_floating_types_of_images(tok: FlexTok, images: Tensor, convert: Callable[[Tensor], Any]) -> None:
    given = convert(images)
    expected = torch.as_tensor(given).float()
    assert torch.equal(tok.tokenize(given), tok.tokenize(expected))
    latents = tok.encode_latents(given)
    assert latents.dtype == torch.float32 and torch.equal(latents, tok.encode_latents(expected))
    assert torch.equal(tok.encode(latents.double()), tok.encode(latents))


def test_noise_of_other_types(tok: FlexTok) -> None:
    tokens = torch.zeros(1, K, dtype=torch.int64)
    noise = torch.randn(1, CONFIG.latent_channels, *tok.latent_size, generator=torch.Generator().manual_seed(0))
    made = decoded(tok, tokens, noise=noise.double())
    assert made.dtype == torch.float32 and torch.equal(made, decoded(tok, tokens, noise=noise))


def test_resizing_may_overshoot(tok: FlexTok, images: Tensor) -> None:
    assert tok.tokenize(images.sign() * 1.9).shape == (2, K)


def test_empty_batches(tok: FlexTok, prior: Prior, images: Tensor) -> None:
    none = torch.zeros(0, K, dtype=torch.int64)
    assert tok.encode_latents(images[:0]).shape == (0, CONFIG.latent_channels, *tok.latent_size)
    assert tok.tokenize(images[:0]).shape == (0, K) and tok.tokenize(images[:0], 3).shape == (0, 3)
    for tokens in (none, []):
        assert decoded(tok, tokens).shape == (0, *images.shape[1:])
        assert decoded(tok, tokens, num_tokens=3, generator=[]).shape == (0, *images.shape[1:])
    assert decoded(tok, none, latent_size=(2, 4)).shape[2:] == (2 * 2, 4 * 2), "pixels of two a side"
    classes = none[:, 0]
    assert prior.generate(classes, 5).shape == (0, 5) and prior.generate(generator=[]).shape == (0, 8)
    assert prior(none[:, :3], classes).shape == (0, 3, 300)


def test_images_and_tokens_that_are_refused(tok: FlexTok, images: Tensor) -> None:
    tokens = tok.tokenize(images)
    wide = torch.full((1, 2), 40_000)
    nan = images.clone()
    nan[1, 0, 0, 0] = math.nan
    pixels = (images + 1) * 127.5
    noise = torch.full((1, CONFIG.latent_channels, *tok.latent_size), math.inf)
    calls: dict[str, Callable[[], object]] = {
        "images are torch.uint8; give floating point": lambda: tok.tokenize(pixels.to(torch.uint8)),
        "images are uint8": lambda: tok.encode_latents(pixels.to(torch.uint8).numpy()),
        "images are torch.bool": lambda: tok.tokenize(images > 0),
        "images are list": lambda: tok.tokenize([images]),
        "images have shape (3, 4, 4)": lambda: tok.tokenize(images[0, :, :4, :4].numpy()),
        "far outside [-1, 1]: turn pixels in 0..255": lambda: tok.tokenize(pixels),
        "images reach 2.1": lambda: tok.encode_latents(torch.full_like(images, IMAGE_LIMIT + 0.1)),
        "images hold NaN": lambda: tok.tokenize(nan),
        "images hold NaN or infinite": lambda: tok.encode_latents(images / 0),
        "tokens must be ids of an integer type, such as int64, not torch.bool": lambda: decoded(tok, tokens > 0),
        "such as int64, not bool": lambda: decoded(tok, np.ones((1, 3), bool)),
        "such as int64, not torch.float64": lambda: decoded(tok, [row.double() for row in tokens]),
        "tokens span -25536..-25536": lambda: decoded(tok, wide.to(torch.int16)),
        "vocabulary is 0..63999": lambda: decoded(tok, torch.full((1, 2), V)),
        "read as a smaller type": lambda: decoded(tok, wide.to(torch.int16)),
        "tokens holds a sample of shape (2, 1); give (B, k), or a list": lambda: decoded(tok, [wide.T]),
        "tokens holds a sample of shape ();": lambda: decoded(tok, [tokens[0], tokens[0, 0]]),
        "tokens has shape (16,)": lambda: decoded(tok, tokens[0]),
        "num_tokens=True": lambda: tok.tokenize(images, num_tokens=True),
        "num_tokens=2.0 is not in": lambda: tok.tokenize(images, num_tokens=2.0),  # type: ignore[arg-type]
        "num_tokens must be ids of an integer type": lambda: decoded(tok, tokens, num_tokens=[2.5, 2.5]),
        "num_tokens has 1 entries for 2": lambda: decoded(tok, tokens, num_tokens=[3]),
        "latent_size=64 must be two whole numbers": lambda: decoded(tok, tokens, latent_size=64),
        "latent_size=(8, 0)": lambda: decoded(tok, tokens, latent_size=(8, 0)),
        "latent_size=(8.0, 8)": lambda: decoded(tok, tokens, latent_size=(8.0, 8)),
        "latent_size=(8, 8, 8)": lambda: decoded(tok, tokens, latent_size=(8, 8, 8)),
        "noise hold NaN or infinite": lambda: decoded(tok, tokens[:1], noise=noise),
        "guidance_scale=nan": lambda: decoded(tok, tokens, guidance_scale=math.nan),
        "guidance_scale=inf at t=1.0": lambda: decoded(tok, tokens, guidance_scale=lambda t: t * math.inf),
        "num_steps=2.5 must be a whole number of at least 1": lambda: decoded(tok, tokens, num_steps=2.5),
    }  # fmt: skip
    for message, call in calls.items():
        with pytest.raises(ValueError) as error:
            call()
        assert message in str(error.value), str(error.value)


@pytest.mark.parametrize("options", [
    {"cfg_scale": math.nan}, {"cfg_scale": [1.0, math.inf]}, {"cfg_scale": lambda i: -math.inf},
    {"temperature": math.nan}, {"temperature": math.inf}, {"temperature": -1.0},
    {"top_k": 0}, {"top_k": 2.5}, {"top_p": math.nan}, {"num_tokens": 2.0},
])  # fmt: skip
def test_sampling_that_is_refused(prior: Prior, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        prior.generate(torch.tensor([0]), **options)


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_other_types_are_refused_everywhere(tok: FlexTok, images: Tensor, kind: torch.dtype) -> None:
    kl = VAE(VAEConfig(latent_channels=4, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=4))
    converted, latents = copy.deepcopy(tok).to(kind), tok.encode_latents(images)
    for call in (
        lambda: converted.tokenize(images),
        lambda: converted.tokenize(images.to(kind)),
        lambda: converted.encode(latents),
        lambda: converted.velocity(latents, 1.0, tok.tokenize(images)),
        lambda: decoded(converted, torch.zeros(1, K, dtype=torch.int64)),
        lambda: kl.to(kind).encode(images),
        lambda: kl.to(kind).decode(torch.zeros(1, 4, 2, 2)),
    ):
        with pytest.raises(ValueError, match=rf"weights of this \w+ are {kind}.*call .float\(\)"):
            call()
    assert converted.float().tokenize(images).shape == (2, K)


def test_weights_that_are_not_finite(tok: FlexTok, prior: Prior, images: Tensor) -> None:
    broken, other = copy.deepcopy(tok), copy.deepcopy(prior)
    broken.encoder.head.weight.data[0, 0] = math.nan
    broken.decoder.head.proj.weight.data[0, 0] = math.inf
    tokens = torch.zeros(1, K, dtype=torch.int64)
    with pytest.raises(ValueError, match="the encoder's codes hold NaN"):
        broken.tokenize(images)
    with pytest.raises(ValueError, match="the decoded latents hold NaN"):
        decoded(broken, tokens)
    vae = VAE(VAEConfig(latent_channels=4, block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=4))
    for parameter in vae.parameters():
        parameter.data.fill_(math.nan)
    net = dataclasses.replace(CONFIG, vae=vae.config, latent_channels=4)
    with pytest.raises(ValueError, match="the autoencoder's latents hold NaN"):
        FlexTok(net, vae).tokenize(images)
    for name in ("head", "token_embedding"):
        other = copy.deepcopy(prior)
        getattr(other, name).weight.data.fill_(math.nan)
        for options in ({}, {"temperature": 0.0}, {"top_k": 3, "top_p": 0.5}):
            with pytest.raises(ValueError, match="the prior's logits hold NaN"):
                other.generate(torch.tensor([0, 1]), 4, **options)
