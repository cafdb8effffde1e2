"""Our checkpoint format: one safetensors file whose metadata holds the configuration as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flextok_pl.interop.tensor_file import build_model, write_tensors
from flextok_pl.models.config import FlexTokConfig, config_from_dict, config_to_dict
from flextok_pl.models.tokenizer import FlexTok

FORMAT = "flextok_pl"
VERSION = "1"
_MAX_CONFIG_CHARACTERS = 100_000


def save_pretrained(tok: FlexTok, path: str | Path) -> Path:
    """Save weights and configuration in one file, atomically.

    Args:
        tok: the tokenizer; its VAE is saved too.
        path: a `.safetensors` file, or a folder that then holds `model.safetensors`.

    Returns:
        The file written.

    Raises:
        OSError: the folder or the disk does not take it.
    """
    path = Path(path).expanduser()
    file = path if path.suffix == ".safetensors" else path / "model.safetensors"
    config = json.dumps(config_to_dict(config_in_use(tok)))
    write_tensors(tok.state_dict(), file, {"format": FORMAT, "version": VERSION, "config": config})
    return file


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
    version = metadata.get("version")
    if version != VERSION:
        raise ValueError(f"{file} has format version {version!r}; this flextok_pl reads version {VERSION!r}")
    return build_model(handle, file, _parse_config(file, metadata.get("config", "")), device=device)


def _parse_config(file: Path, text: str) -> FlexTokConfig:
    if len(text) > _MAX_CONFIG_CHARACTERS:
        raise ValueError(f"{file}: its configuration of {len(text)} characters is too long to be one")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: its configuration is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: its configuration is a {type(values).__name__} instead of a mapping")
    try:
        return config_from_dict(FlexTokConfig, values)
    except (ValueError, TypeError, RecursionError) as error:
        raise ValueError(f"{file}: its configuration is wrong: {error}") from error
