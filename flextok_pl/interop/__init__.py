"""Checkpoints: our safetensors format, and the official one in both directions."""

from flextok_pl.interop.native import load_prior, save_pretrained, save_prior
from flextok_pl.interop.official import save_official
from flextok_pl.interop.official_config import official_to_config
from flextok_pl.interop.official_export import config_to_official
from flextok_pl.interop.pretrained import load_pretrained

__all__ = [
    "config_to_official",
    "load_pretrained",
    "load_prior",
    "official_to_config",
    "save_official",
    "save_pretrained",
    "save_prior",
]
