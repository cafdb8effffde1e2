"""Small tokenizers, and what the official format makes of them, for tests."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.models.tokenizer import FlexTok

SMALL_VAE = VAEConfig(latent_channels=4, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4)
SMALL = FlexTokConfig(
    vae=SMALL_VAE,
    latent_channels=4,
    encoder_width=32,
    encoder_depth=1,
    encoder_head_dim=16,
    decoder_width=64,
    decoder_depth=2,
    decoder_head_dim=32,
    mlp_ratio=3.0,
    num_registers=5,
    fsq_levels=(7, 5, 3),
    patch_size=1,
    grid_size=(3, 6),
    max_timestep=1000.0,
    time_frequencies=32,
    repa_layer=0,
    nested_dropout="uniform_pow2",
    null_dropout=0.3,
    timestep_law="logit_normal",
    mode_scale=0.5,
    stratified=True,
)
SMALL_VAE_FILE = {"block_out_channels": [8, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}


def small_tokenizer(config: FlexTokConfig = SMALL) -> FlexTok:
    tok = FlexTok(config)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in tok.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return tok


def assert_same(a: FlexTok, b: FlexTok) -> None:
    assert a.config == b.config
    left, right = a.state_dict(), b.state_dict()
    assert list(left) == list(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype and torch.equal(tensor, right[name]), name


def metadata(file: Path) -> dict[str, str]:
    with safe_open(str(file), "pt") as handle:
        return dict(handle.metadata())


def official_tree(golden_dir: Path) -> dict[str, Any]:
    return json.loads((golden_dir / "config.json").read_text())
