"""Translate the configuration of an autoencoder: diffusers' `AutoencoderKL` config.json <-> `VAEConfig`."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flextok_pl.config import VAEConfig, config_from_dict
from flextok_pl.interop.plain_data import read_json

DOWN_BLOCK, UP_BLOCK = "DownEncoderBlock2D", "UpDecoderBlock2D"
_PIXEL_CLASS = "PixelAutoencoder"

# Diffusers' defaults for keys that a config.json leaves out.
_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": (DOWN_BLOCK,),
    "up_block_types": (UP_BLOCK,),
    "block_out_channels": (64,),
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 4,
    "norm_num_groups": 32,
    "scaling_factor": 0.18215,
    "shift_factor": None,
    "latents_mean": None,
    "latents_std": None,
    "use_quant_conv": True,
    "use_post_quant_conv": True,
    "mid_block_add_attention": True,
}
# Hints for tiling and mixed precision. Neither these nor keys with an underscore change weights or results.
_IGNORED = frozenset({"sample_size", "force_upcast"})


def read_vae_config(folder: Path) -> VAEConfig:
    """Read the configuration of an autoencoder in a folder of this package or diffusers."""
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} is not an autoencoder: it has no config.json")
    values = read_json(file)
    if values.get("_class_name") == _PIXEL_CLASS:
        return config_from_dict(VAEConfig, {key: value for key, value in values.items() if key[:1] != "_"})
    return vae_config_from_diffusers(values)


def vae_config_from_diffusers(values: Mapping[str, Any]) -> VAEConfig:
    """Read the contents of any diffusers `AutoencoderKL` config.json.

    A null `scaling_factor` or `shift_factor` becomes 1 or 0. Raises ValueError for an unknown key, or for one that our
    autoencoder does not support.
    """
    name = values.get("_class_name", "AutoencoderKL")
    if name != "AutoencoderKL":
        raise ValueError(f"_class_name={name!r} is not supported; give the config of an 'AutoencoderKL'")
    given = {key: value for key, value in values.items() if key[:1] != "_" and key not in _IGNORED}
    unknown = sorted(set(given) - set(_DEFAULTS))
    if unknown:
        raise ValueError(f"the autoencoder config has an unknown key {unknown[0]!r}={given[unknown[0]]!r}")
    full = _DEFAULTS | given
    full["image_channels"] = full.pop("in_channels")
    if full.pop("out_channels") != full["image_channels"]:
        raise ValueError(
            f"out_channels={given.get('out_channels', 3)} differs from in_channels={full['image_channels']}, which is "
            "not supported: an autoencoder must return as many channels as it takes"
        )
    for key in ("latents_mean", "latents_std"):
        if full.pop(key) is not None:
            raise ValueError(f"{key} is not supported: latents are normalised by scaling_factor and shift_factor")
    for key, default in (("down_block_types", DOWN_BLOCK), ("up_block_types", UP_BLOCK)):
        if all(block == default for block in full[key]):
            full[key] = ()
    full["scaling_factor"] = 1.0 if full["scaling_factor"] is None else full["scaling_factor"]
    full["shift_factor"] = 0.0 if full["shift_factor"] is None else full["shift_factor"]
    return config_from_dict(VAEConfig, full)


def vae_config_to_diffusers(config: VAEConfig) -> dict[str, Any]:
    """Arguments of diffusers' `AutoencoderKL`; for the kind `pixel`, the input of `read_vae_config`."""
    values = dataclasses.asdict(config)
    if config.kind == "pixel":
        return {"_class_name": _PIXEL_CLASS, **values}
    levels = len(config.block_out_channels)
    for name in ("down_block_types", "up_block_types"):
        if len(getattr(config, name)) not in (0, levels):
            raise ValueError(
                f"{name}={getattr(config, name)} needs {levels} entries, one for each of block_out_channels="
                f"{config.block_out_channels}, or none"
            )
    odd = [width for width in config.block_out_channels if width % config.norm_num_groups]
    if odd:
        raise ValueError(f"block_out_channels={odd[0]} must be a multiple of norm_num_groups={config.norm_num_groups}")
    del values["kind"]
    channels = values.pop("image_channels")
    return values | {
        "in_channels": channels,
        "out_channels": channels,
        "down_block_types": config.down_block_types or (DOWN_BLOCK,) * levels,
        "up_block_types": config.up_block_types or (UP_BLOCK,) * levels,
        "shift_factor": config.shift_factor or None,
    }
