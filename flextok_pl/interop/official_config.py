"""The official configuration <-> `FlexTokConfig`."""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import flextok_pl.interop.official_schema as schema
from flextok_pl.config import FlexTokConfig, NestedDropoutLaw, TimestepLaw, VAEConfig
from flextok_pl.interop.plain_data import check_plain, parse_text
from flextok_pl.models.vae import vae_config_from_diffusers

PUBLISHED_VAE = VAEConfig()
"""The architecture that the official code builds whatever the checkpoint says."""

_TOP = "flextok.flextok_wrapper.FlexTok"
_PARTS = ("vae", "encoder", "decoder", "regularizer", "flow_matching_noise_module", "pipeline")
_DROPOUT_LAWS = ("uniform", "pow2", "uniform_pow2")


def parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """The configuration in the metadata of an official safetensors file, as plain data.

    Args:
        metadata: top-level key -> python literal, JSON or YAML.

    Raises:
        ValueError: an entry is too long, or no plain data.
    """
    return {
        key: parse_text(f"metadata {key!r}", text) for key, text in metadata.items() if (key, text) != ("format", "pt")
    }


def official_to_config(
    official: Mapping[str, Any], vae_config: Mapping[str, Any] | str | Path | None = None
) -> FlexTokConfig:
    """Read an official configuration. Nothing that it names is imported.

    The names under which its modules pass tensors on are not followed: they differ between sources, and the order and
    kinds of the modules already fix the computation.

    Args:
        official: plain data, from `parse_metadata` or a config.json.
        vae_config: diffusers' `AutoencoderKL` configuration, or a JSON file of it; the official one does not tell the
            architecture, and the default is the published one.

    Raises:
        ValueError: a module or option is unknown, contradicts another one, or asks for what our model lacks.
    """
    check_plain("the configuration", official)
    unknown = sorted(set(official) - {"_target_", *_PARTS})
    if unknown:
        raise ValueError(f"the configuration has an unknown part {unknown[0]!r}; the parts are {', '.join(_PARTS)}")
    schema.check_target("the configuration", {"_target_": _TOP, **official}, _TOP)
    enc = _read_sequence("encoder", official.get("encoder"), schema.ENCODER)
    dec = _read_sequence("decoder", official.get("decoder"), schema.DECODER)
    vae = schema.VAE.read("vae", official.get("vae"), _warn)
    fsq = schema.REGULARIZER.read("regularizer", official.get("regularizer"), _warn)
    noise = schema.NOISE.read("flow_matching_noise_module", official.get("flow_matching_noise_module"), _warn)
    pipeline = schema.PIPELINE.read("pipeline", official.get("pipeline"), _warn)

    encoder_width = _same({f"encoder {name}.dim": part["dim"] for name, part in enc.items() if "dim" in part})
    decoder_width = _same({f"decoder {name}.dim": part["dim"] for name, part in dec.items() if "dim" in part})
    channels = _same(
        {
            "vae.latent_channels": vae["latent_channels"],
            "enc_patch_emb.channels_in": enc["enc_patch_emb"]["channels_in"],
            "dec_noise_patch_emb.channels_in": dec["dec_noise_patch_emb"]["channels_in"],
            "dec_to_patches.channels_out": dec["dec_to_patches"]["channels_out"],
            **({} if pipeline["out_channels"] is None else {"pipeline.out_channels": pipeline["out_channels"]}),
        }
    )
    registers = enc["enc_register_module"]
    num_registers = _same(
        {
            "enc_register_module.n_min": registers["n_min"],
            "enc_register_module.n_max": registers["n_max"],
            "enc_register_module.n_eval": registers["n_eval"] or registers["n_max"],
            "dec_registers_posemb_module.max_sizes": _single(dec["dec_registers_posemb_module"]["max_sizes"]),
        }
    )
    patch_sizes = _same(
        {
            "enc_patch_emb.patch_sizes": enc["enc_patch_emb"]["patch_sizes"],
            "dec_noise_patch_emb.patch_sizes": dec["dec_noise_patch_emb"]["patch_sizes"],
            "dec_to_patches.patch_sizes": dec["dec_to_patches"]["patch_sizes"],
        }
    )
    grid_size = _same(
        {
            "enc_posemb_module.max_sizes": enc["enc_posemb_module"]["max_sizes"],
            "dec_patches_posemb_module.max_sizes": dec["dec_patches_posemb_module"]["max_sizes"],
        }
    )
    if len(patch_sizes) != 2 or len(set(patch_sizes)) != 1 or len(grid_size) != 2:
        raise ValueError(f"patch_sizes={patch_sizes} and max_sizes={grid_size}: patches must be square, the grid 2-D")
    _same(
        {
            "the number of levels": len(fsq["levels"]),
            "enc_to_latents.dim_out": enc["enc_to_latents"]["dim_out"],
            "dec_from_latents.dim_in": dec["dec_from_latents"]["dim_in"],
        }
    )
    mlp_ratio = _same({f"{name}.mlp_ratio": float(part["mlp_ratio"]) for name, part in _trunks(enc, dec).items()})
    layers = dec["dec_transformer"]["intermediate_layers"] or ()
    if len(layers) > 1:
        raise ValueError(f"dec_transformer.intermediate_layers={list(layers)} has more than one layer")
    mode = dec["dec_nested_dropout"]["size_sampling_mode"]
    if mode not in _DROPOUT_LAWS:
        raise ValueError(f"dec_nested_dropout.size_sampling_mode={mode!r} must be one of {_DROPOUT_LAWS}")
    return FlexTokConfig(
        vae=_vae_config(vae["scaling_factor"], channels, vae_config),
        latent_channels=channels,
        encoder_width=encoder_width,
        encoder_depth=enc["enc_transformer"]["depth"],
        encoder_head_dim=enc["enc_transformer"]["head_dim"],
        decoder_width=decoder_width,
        decoder_depth=dec["dec_transformer"]["depth"],
        decoder_head_dim=dec["dec_transformer"]["head_dim"],
        mlp_ratio=mlp_ratio,
        num_registers=num_registers,
        fsq_levels=fsq["levels"],
        patch_size=patch_sizes[0],
        grid_size=cast(tuple[int, int], grid_size),
        max_timestep=float(dec["dec_time_embedder"]["max_timestep"]),
        time_frequencies=dec["dec_time_embedder"]["frequency_embedding_size"],
        repa_layer=layers[0] if layers else None,
        nested_dropout=cast(NestedDropoutLaw, mode),
        null_dropout=float(dec["dec_latent_dropout"]["dropout_prob"]),
        timestep_law=_timestep_law(noise),
        mode_scale=float(noise["mode_scale"]),
        stratified=noise["stratisfied"],
    )


def _read_sequence(side: str, values: Any, modules: Mapping[str, schema.Module]) -> dict[str, dict[str, Any]]:
    """The options of an encoder's or decoder's modules, whose order must be ours."""
    schema.check_target(side, values, schema.WRAPPER)
    unknown = sorted(set(values) - {"_target_", "module_dict"})
    entries = values.get("module_dict")
    if unknown or not isinstance(entries, dict):
        raise ValueError(f"{side} must consist of a mapping 'module_dict'; it has {sorted(values)}")
    names = []
    for name, entry in entries.items():
        if side == "decoder" and "repa" in name:
            schema.check_target(f"{side}.{name}", entry, *schema.REPA_TARGETS)
        else:
            names.append(name)
    for name in names:
        if name not in modules:
            raise ValueError(f"{side} has an unknown module {name!r}; the function may depend on it")
    if names != list(modules):
        missing = [name for name in modules if name not in names]
        problem = f"lacks {missing[0]!r}" if missing else f"has its modules in another order: {', '.join(names)}"
        raise ValueError(f"{side} {problem}; they must be {', '.join(modules)}")
    return {name: module.read(f"{side}.{name}", entries[name], _warn) for name, module in modules.items()}


def _vae_config(
    scaling_factor: float | None, channels: int, vae_config: Mapping[str, Any] | str | Path | None
) -> VAEConfig:
    values: dict[str, Any] = {
        "block_out_channels": PUBLISHED_VAE.block_out_channels,
        "layers_per_block": PUBLISHED_VAE.layers_per_block,
        "norm_num_groups": PUBLISHED_VAE.norm_num_groups,
        "latent_channels": channels,
        "scaling_factor": None,
    }
    if vae_config is not None:
        given = read_json(Path(vae_config)) if isinstance(vae_config, str | Path) else vae_config
        check_plain("vae_config", given)
        values = dict(given)
    for key in ("down_block_types", "up_block_types"):
        if key not in values:
            block = "DownEncoderBlock2D" if key == "down_block_types" else "UpDecoderBlock2D"
            values[key] = [block] * len(values.get("block_out_channels", ()))
    if scaling_factor is not None:
        values["scaling_factor"] = scaling_factor
    elif values.get("scaling_factor") is None:
        raise ValueError("vae.scaling_factor is null: give vae_config, a diffusers configuration with a scaling_factor")
    config = vae_config_from_diffusers(values)
    if config.latent_channels != channels:
        raise ValueError(f"vae_config has latent_channels={config.latent_channels}, the checkpoint {channels}")
    return config


def read_json(file: Path) -> dict[str, Any]:
    """A JSON file that holds a mapping of plain data.

    Raises:
        ValueError: there is no such file, or it holds something else.
    """
    if not file.is_file():
        raise ValueError(f"no configuration file {str(file)!r}")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError, OSError) as error:
        raise ValueError(f"{file} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} holds a {type(values).__name__} instead of a mapping")
    check_plain(str(file), values)
    return values


def _timestep_law(noise: Mapping[str, Any]) -> TimestepLaw:
    if noise["ln"]:
        return "logit_normal"
    return "mode" if noise["mode_scale"] else "uniform"


def _trunks(enc: Mapping[str, Any], dec: Mapping[str, Any]) -> dict[str, Any]:
    return {"enc_transformer": enc["enc_transformer"], "dec_transformer": dec["dec_transformer"]}


def _same(values: Mapping[str, Any]) -> Any:
    """The value that all entries share."""
    (first, value), *rest = values.items()
    for name, other in rest:
        if other != value:
            raise ValueError(f"{first}={value} and {name}={other} differ; this model has one value for both")
    return value


def _single(sizes: tuple[int, ...]) -> int:
    if len(sizes) != 1:
        raise ValueError(f"dec_registers_posemb_module.max_sizes={list(sizes)} must have one entry")
    return sizes[0]


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
