"""Our checkpoint format: one safetensors file whose metadata holds the configuration as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig, PriorConfig, config_from_dict, config_to_dict
from flextok_pl.interop.tensor_file import build_model, open_tensors, write_tensors
from flextok_pl.models.prior import Prior
from flextok_pl.models.tokenizer import FlexTok

FORMAT = "flextok_pl"
PRIOR_FORMAT = "flextok_pl.prior"
VERSION = "1"
_MAX_CONFIG_CHARACTERS = 100_000

ConfigT = TypeVar("ConfigT", FlexTokConfig, PriorConfig)


def save_pretrained(tok: FlexTok, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Save weights and configuration in one file, atomically.

    Args:
        tok: the tokenizer; its VAE is saved too.
        path: a `.safetensors` file, or a folder that then holds `model.safetensors`.
        weights: its state dict, where the tokenizer itself holds parts of it only.

    Returns:
        The file written.

    Raises:
        OSError: the folder or the disk does not take it.
    """
    return _save(weights or tok.state_dict(), config_in_use(tok), FORMAT, _file(path, "model.safetensors"))


def save_prior(prior: Prior, path: str | Path, weights: Mapping[str, Tensor] | None = None) -> Path:
    """Save a prior in one file, atomically.

    Args:
        prior: the prior.
        path: a `.safetensors` file, or a folder that then holds `prior.safetensors`.
        weights: its state dict, where the prior itself holds parts of it only.

    Returns:
        The file written.

    Raises:
        OSError: the folder or the disk does not take it.
    """
    return _save(weights or prior.state_dict(), prior.config, PRIOR_FORMAT, _file(path, "prior.safetensors"))


def config_in_use(tok: FlexTok) -> FlexTokConfig:
    """The configuration with that of the VAE the tokenizer really has, whose scaling may have been measured later."""
    return dataclasses.replace(tok.config, vae=None if tok.vae is None else tok.vae.config)


def read_native(
    handle: Any, file: Path, metadata: Mapping[str, str], device: str | torch.device | None = None
) -> FlexTok:
    """Load an open file of ours.

    Raises:
        ValueError: the version is unknown, or configuration or tensors are wrong.
    """
    return build_tokenizer(handle, file, _parse_config(file, metadata, FlexTokConfig), device=device)


def load_prior(path: str | Path, device: str | torch.device | None = None) -> Prior:
    """Load a prior that `save_prior` wrote, in evaluation mode.

    Args:
        path: a `.safetensors` file, or a folder with `prior.safetensors`.
        device: where to put the weights.

    Raises:
        ValueError: there is no such file, it is damaged, or holds something else.
    """
    file = _file(path, "prior.safetensors")
    with open_tensors(file) as handle:
        metadata = handle.metadata() or {}
        if metadata.get("format") != PRIOR_FORMAT:
            raise ValueError(
                f"{file} is no prior (its metadata has {sorted(metadata)[:8]}); give the prior.safetensors that "
                "training a PriorModule leaves"
            )
        config = _parse_config(file, metadata, PriorConfig)
        return build_model(handle, file, lambda: Prior(config), {"depth": config.depth}, device=device)


def build_tokenizer(
    handle: Any,
    file: Path,
    config: FlexTokConfig,
    name_in_file: Callable[[str], str] = lambda name: name,
    ignorable: Callable[[str], bool] = lambda name: False,
    device: str | torch.device | None = None,
) -> FlexTok:
    """`build_model` for a tokenizer."""
    depths = {"encoder_depth": config.encoder_depth, "decoder_depth": config.decoder_depth}
    if config.vae is not None:
        depths["layers_per_block"] = config.vae.layers_per_block
    return build_model(handle, file, lambda: FlexTok(config), depths, name_in_file, ignorable, device)


def _file(path: str | Path, name: str) -> Path:
    path = Path(path).expanduser()
    return path if path.suffix == ".safetensors" else path / name


def _save(weights: Mapping[str, Tensor], config: FlexTokConfig | PriorConfig, kind: str, file: Path) -> Path:
    text = json.dumps(config_to_dict(config))
    write_tensors(weights, file, {"format": kind, "version": VERSION, "config": text})
    return file


def _parse_config(file: Path, metadata: Mapping[str, str], cls: type[ConfigT]) -> ConfigT:
    version, text = metadata.get("version"), metadata.get("config", "")
    if version != VERSION:
        raise ValueError(f"{file} has format version {version!r}; this flextok_pl reads version {VERSION!r}")
    if len(text) > _MAX_CONFIG_CHARACTERS:
        raise ValueError(f"{file}: its configuration of {len(text)} characters is too long to be one")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its configuration is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: its configuration is a {type(values).__name__} instead of a mapping")
    try:
        return config_from_dict(cls, values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: its configuration is wrong: {error}") from error
