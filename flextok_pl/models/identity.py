"""Identify the tokens and latents that a model makes, by a hash of everything that affects them.

Training a decoder further changes neither, so token shards, latent shards and priors stay valid.
"""

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig
from flextok_pl.contracts import tensors_hash, weights_hash
from flextok_pl.models.vae import VAE

_OF_LATENTS = ("kind", "latent_channels", "norm_num_groups", "act_fn")
_OF_CODES = ("patch_size", "num_registers", "encoder_head_dim", "layout", "causal_registers", "fsq_levels")
"""Options that affect tokens but not the names and shapes of weights."""


def latents_identity(vae: VAE) -> dict[str, Any]:
    """What latent shards record of an autoencoder; see `same_maker`. They hold unscaled latents."""
    return {"sha256": tensors_hash(_encoder_of(vae), _facts(vae, _OF_LATENTS)), "model_sha256": weights_hash(vae)}


def tokens_identity(tokenizer: nn.Module, encoder: nn.Module, vae: VAE | None, config: FlexTokConfig) -> dict[str, Any]:
    """What token shards and priors record of a tokenizer, as JSON types; `same_maker` compares records.

    `sha256` hashes what makes tokens: the encoder, the quantiser's levels, the autoencoder's encoder and the scale of
    its latents. `model_sha256` hashes all weights. `same_as` lists the tokenizers that earlier trainings started from
    and that make the same tokens.
    """
    own = _tokens_hash(encoder, vae, config)
    first, *others = config.same_tokens_as or ("",)
    hashes = {"sha256": own, "model_sha256": weights_hash(tokenizer), **({"same_as": others} if first == own else {})}
    return {**hashes, "vocab_size": config.vocab_size, "num_tokens": config.num_registers}


def makers_of_the_same(identity: Mapping[str, Any]) -> list[str]:
    """`FlexTokConfig.same_tokens_as` of a tokenizer that takes from this one everything that makes tokens."""
    return [identity["sha256"], identity["model_sha256"], *identity.get("same_as", ())]


def _tokens_hash(encoder: nn.Module, vae: VAE | None, config: FlexTokConfig) -> str:
    facts = json.dumps({name: getattr(config, name) for name in _OF_CODES})
    tensors = encoder.state_dict(prefix="encoder.")
    if vae is not None:
        facts += _facts(vae, (*_OF_LATENTS, "scaling_factor", "shift_factor"))
        tensors |= _encoder_of(vae)
    return tensors_hash(tensors, facts)


def _facts(vae: VAE, names: tuple[str, ...]) -> str:
    return json.dumps({name: getattr(vae.config, name) for name in names})


def _encoder_of(vae: VAE) -> dict[str, Tensor]:
    return {name: value for name, value in vae.state_dict().items() if name.startswith(("vae.encoder.", "vae.quant_"))}
