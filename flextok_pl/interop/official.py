"""Checkpoints of the official code (apple/ml-flextok): the same tensors under other names."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flextok_pl.interop.native import build_tokenizer, config_in_use
from flextok_pl.interop.official_config import official_to_config
from flextok_pl.interop.official_export import config_to_official
from flextok_pl.interop.tensor_file import write_tensors
from flextok_pl.models.tokenizer import FlexTok

_ENC, _DEC = "encoder.module_dict.", "decoder.module_dict."
_PREFIXES = {
    "vae.vae.": "vae.vae.",
    "encoder.patch_embed.": f"{_ENC}enc_patch_emb.patch_proj.",
    "encoder.patch_posemb": f"{_ENC}enc_posemb_module.posembs",
    "encoder.registers": f"{_ENC}enc_register_module.registers",
    "encoder.blocks.": f"{_ENC}enc_transformer.blocks.",
    "encoder.head.": f"{_ENC}enc_to_latents.proj.",
    "decoder.code_embed.": f"{_DEC}dec_from_latents.proj.",
    "decoder.register_posemb": f"{_DEC}dec_registers_posemb_module.posembs",
    "decoder.mask_token": f"{_DEC}dec_nested_dropout.dropout_mask_token",
    "decoder.null_token": f"{_DEC}dec_latent_dropout.nullcond",
    "decoder.patch_embed.": f"{_DEC}dec_noise_patch_emb.patch_proj.",
    "decoder.patch_posemb": f"{_DEC}dec_patches_posemb_module.posembs",
    "decoder.time_embed.": f"{_DEC}dec_time_embedder.",
    "decoder.blocks.": f"{_DEC}dec_transformer.blocks.",
    "decoder.head.": f"{_DEC}dec_to_patches.",
}
"""Start of a name in our state dict -> start of the official name."""


def official_name(name: str) -> str:
    """The official name of a tensor of our state dict."""
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no official name for {name}")


def read_official(
    handle: Any,
    file: Path,
    official: Mapping[str, Any],
    vae_config: Mapping[str, Any] | str | Path | None = None,
    device: str | torch.device | None = None,
) -> FlexTok:
    """Load an open file of the official code.

    Args:
        handle: from `tensor_file.open_tensors`.
        file: its path, for messages.
        official: its configuration as plain data.
        vae_config: see `official_to_config`.
        device: where to put the weights.

    Raises:
        ValueError: configuration or tensors are wrong, or not what our model implements.
    """
    try:
        config = official_to_config(official, vae_config)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    try:
        return build_tokenizer(handle, file, config, official_name, _is_repa_head, device)
    except ValueError as error:
        if vae_config is None and "vae.vae." in str(error):
            raise ValueError(
                f"{error}. The file does not say what its autoencoder is, and it is not the published one: "
                "give vae_config, the diffusers AutoencoderKL configuration (a mapping or a JSON file)"
            ) from error
        raise


def save_official(tok: FlexTok, file: str | Path) -> Path:
    """Save a tokenizer in the official format: its tensor names, its configuration as metadata, the VAE inside.

    Args:
        tok: a tokenizer with a `kl` VAE.
        file: the `.safetensors` file.

    Returns:
        The file written.

    Raises:
        ValueError: the official format cannot express the model.
        OSError: the folder or the disk does not take it.
    """
    file = Path(file).expanduser()
    official = config_to_official(config_in_use(tok))
    tensors = {official_name(name): tensor for name, tensor in tok.state_dict().items()}
    write_tensors(tensors, file, {key: str(value) for key, value in official.items()})
    return file


def _is_repa_head(name: str) -> bool:
    return name.startswith(_DEC) and "repa" in name.removeprefix(_DEC).split(".")[0]
