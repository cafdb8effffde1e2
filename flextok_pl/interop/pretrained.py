"""Load a tokenizer of either format, from this machine or from the Hub."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from flextok_pl.interop.native import FORMAT, read_native
from flextok_pl.interop.official import read_official
from flextok_pl.interop.official_config import parse_metadata, read_json
from flextok_pl.interop.tensor_file import open_tensors
from flextok_pl.models.tokenizer import FlexTok

_WEIGHTS, _CONFIG = "model.safetensors", "config.json"


def load_pretrained(
    path_or_hub_id: str | Path,
    *,
    vae_config: Mapping[str, Any] | str | Path | None = None,
    device: str | torch.device | None = None,
) -> FlexTok:
    """Load a tokenizer saved by this package or by the official code, in evaluation mode.

    A file on this machine comes first, then the Hub. An official file carries its configuration as metadata; where
    it does not, the config.json beside it is read.

    Args:
        path_or_hub_id: a `.safetensors` file, a folder with `model.safetensors`, or a Hub id.
        vae_config: diffusers' `AutoencoderKL` configuration (a mapping or a JSON file) of an official checkpoint whose
            autoencoder is not the published one.
        device: where to put the weights.

    Raises:
        ValueError: there is no such model, the file is damaged, or is not a FlexTok this package can represent.
    """
    file, config_file = _find(path_or_hub_id)
    with open_tensors(file) as handle:
        metadata = handle.metadata() or {}
        if metadata.get("format") == FORMAT:
            if vae_config is not None:
                raise ValueError(f"{file} describes its own autoencoder; vae_config is for official checkpoints")
            return read_native(handle, file, metadata, device)
        if "encoder" in metadata or "decoder" in metadata:
            try:
                official = parse_metadata(metadata)
            except ValueError as error:
                raise ValueError(f"{file}: {error}") from error
        elif config_file is not None:
            official = read_json(config_file)
        else:
            raise ValueError(
                f"{file} is no FlexTok checkpoint: neither its metadata (keys: {sorted(metadata)[:8]}) nor a "
                "config.json beside it tells the model"
            )
        return read_official(handle, file, official, vae_config, device)


def _find(path_or_hub_id: str | Path) -> tuple[Path, Path | None]:
    """The weights file and, where there is one, the config.json beside it."""
    path = Path(path_or_hub_id).expanduser()
    if path.is_dir():
        path = path / _WEIGHTS
    if path.is_file():
        beside = path.parent / _CONFIG
        return path, beside if beside.is_file() else None
    name = str(path_or_hub_id)
    if (
        isinstance(path_or_hub_id, Path)
        or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)
        or name.endswith(".safetensors")
    ):
        raise ValueError(
            f"no checkpoint {name!r}: give a .safetensors file, a folder with {_WEIGHTS}, or a Hub id owner/name"
        )
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError

    try:
        weights = Path(hf_hub_download(name, _WEIGHTS))
        try:
            return weights, Path(hf_hub_download(name, _CONFIG))
        except EntryNotFoundError:
            return weights, None
    except Exception as error:  # its errors come from several network libraries
        raise ValueError(
            f"no folder {name!r} here, and it could not be fetched from the Hub: {type(error).__name__}: {error}"
        ) from error
