"""Read and write checkpoints of the official code (apple/ml-flextok): the same tensors under other names.

Their configuration is in the metadata, each part as the text of a Python literal, or in a config.json beside the file.
"""

import dataclasses
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flextok_pl.config import FlexTokConfig, VAEConfig, config_from_dict
from flextok_pl.interop.autoencoder import (
    DOWN_BLOCK,
    UP_BLOCK,
    vae_config_from_diffusers,
    vae_config_to_diffusers,
)
from flextok_pl.interop.format import Contents, Format, Written
from flextok_pl.interop.official_schema import LAWS, by_our_names, entries_of, fact_names, read, write
from flextok_pl.interop.official_table import ADDITION, NESTED_DROPOUT, POSITIONS, REGISTERS, TOP, Variant, parts_of
from flextok_pl.interop.plain_data import check_plain, parse_text, read_json
from flextok_pl.interop.tensor_file import TensorFile

PUBLISHED_VAE = VAEConfig()  # architecture that the official code builds for every checkpoint

_BESIDE = "config.json"
# Given by other facts, by the modules, or by the values of the position tables.
_SAID_OTHERWISE = {"vae", "patch_size", "repa_layer", "timestep_law", "layout", "missing_tokens", "position_base"}
_OF_VAE_SHOWN = {"latent_channels", "scaling_factor"}
_NOTES = {"started_from", "trained_grids", "same_tokens_as"}  # the official format has no place for these
_ENC, _DEC = "encoder.module_dict.", "decoder.module_dict."
_PREFIXES = {  # prefix of a name in our state dict -> prefix of the official name
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


class Official(Format[FlexTokConfig]):
    """The format of the published tokenizers."""

    companion = _BESIDE

    def recognises(self, file: TensorFile) -> bool:
        """Check that its metadata have the parts of a model, or that there is a config.json beside it."""
        return bool({"encoder", "decoder"} & set(file.metadata)) or _BESIDE in file.beside

    def read(
        self, file: TensorFile, vae_config: Mapping[str, Any] | str | Path | None = None
    ) -> Contents[FlexTokConfig]:
        """Read the configuration from the metadata, or else from the file beside it."""
        if {"encoder", "decoder"} & set(file.metadata):
            official = parse_metadata(file.metadata)
        else:
            official = read_json(file.beside[_BESIDE])
        doubt = (
            ". The file does not describe its autoencoder, so the published one is assumed: for another, give "
            "vae_config, the diffusers AutoencoderKL configuration (a mapping or a JSON file)"
        )
        config = official_to_config(official, vae_config)
        _, names = by_our_names(official, parts_of(_variant(official)))

        def source(ours: str) -> str:
            part, folder, module, *rest = official_name(ours).split(".")
            return ".".join([part, folder, names.get((part, module), module), *rest])

        return Contents(config, source, _is_repa_head, doubt if vae_config is None else "")

    def write(self, config: FlexTokConfig, weights: Mapping[str, Tensor]) -> Written:
        """Write each part as a Python literal, and the autoencoder's tensors without its architecture."""
        metadata = {key: str(value) for key, value in config_to_official(config).items()}
        return Written(metadata, {official_name(name): tensor for name, tensor in weights.items()})


def official_name(name: str) -> str:
    """The official name of a tensor of our state dict."""
    for ours, theirs in _PREFIXES.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    raise AssertionError(f"no official name for {name}")


def _is_repa_head(name: str) -> bool:
    return name.startswith(_DEC) and "repa" in name.removeprefix(_DEC).split(".")[0]


def parse_metadata(metadata: Mapping[str, str]) -> dict[str, Any]:
    """Parse the configuration in an official file's metadata: part -> Python literal, JSON or YAML, as plain data."""
    return {
        key: parse_text(f"metadata {key!r}", text) for key, text in metadata.items() if (key, text) != ("format", "pt")
    }


def official_to_config(
    official: Mapping[str, Any], vae_config: Mapping[str, Any] | str | Path | None = None
) -> FlexTokConfig:
    """Read an official configuration, plain data from `parse_metadata` or a config.json.

    It does not state the architecture of the autoencoder: without `vae_config`, as in `Format.read`, the published one
    is assumed. ValueError for an option that is unknown, contradicts another, or is not supported by our model.
    """
    check_plain("the configuration", official)
    variant = _variant(official)
    parts = parts_of(variant)
    facts = read(by_our_names(official, parts)[0], TOP, parts)
    patches, grid = facts.pop("patch_sizes"), facts["grid_size"]
    if len(patches) != 2 or len(set(patches)) != 1 or len(grid) != 2:
        raise ValueError(f"patch_sizes={patches} and max_sizes={grid}: patches must be square, the grid 2-D")
    if variant.grid:
        facts |= {"layout": "grid", "num_registers": math.prod(grid), "register_table": (math.prod(grid),)}
    if not variant.nested_dropout:
        facts |= {"nested_dropout": "none", "missing_tokens": "zero"}
    for value, wanted, path in (
        (facts.pop("register_table"), (facts["num_registers"],), "decoder.dec_registers_posemb_module.max_sizes"),
        (facts.pop("num_levels"), len(facts["fsq_levels"]), "encoder.enc_to_latents.dim_out"),
    ):
        if value != wanted:
            raise ValueError(f"{path}={value} must be {wanted}, by the number of registers and levels")
    layers = facts.pop("repa_layers", ())
    if len(layers) > 1:
        raise ValueError(f"dec_transformer.intermediate_layers={list(layers)} has more than one layer")
    law = "logit_normal" if facts.pop("logit_normal") else "mode" if facts["mode_scale"] else "uniform"
    autoencoder = _vae_config(facts.pop("scaling_factor", None), facts["latent_channels"], vae_config)
    values = {"patch_size": patches[0], "repa_layer": layers[0] if layers else None, "timestep_law": law}
    return dataclasses.replace(config_from_dict(FlexTokConfig, {"vae": None, **facts, **values}), vae=autoencoder)


def _variant(official: Mapping[str, Any]) -> Variant:
    """The kind of model that a configuration describes; one without registers has 2-D tokens, as published."""
    encoder, decoder = (
        [
            each["_target_"]
            for each in entries_of(official, part).values()
            if isinstance(each, dict) and "_target_" in each
        ]
        for part in ("encoder", "decoder")
    )
    if not encoder or REGISTERS in encoder:
        return Variant()
    order = [each for each in decoder if each in (ADDITION, POSITIONS)]
    return Variant(grid=True, nested_dropout=NESTED_DROPOUT in decoder, sum_first=order[:1] == [ADDITION])


def _vae_config(
    scaling_factor: float | None, channels: int, vae_config: Mapping[str, Any] | str | Path | None
) -> VAEConfig:
    if vae_config is None:
        vae_config = vae_config_to_diffusers(PUBLISHED_VAE) | {"latent_channels": channels, "scaling_factor": None}
    given = read_json(Path(vae_config)) if isinstance(vae_config, str | Path) else dict(vae_config)
    check_plain("vae_config", given)
    levels = len(given.get("block_out_channels", ()))
    values = {"down_block_types": [DOWN_BLOCK] * levels, "up_block_types": [UP_BLOCK] * levels, **given}
    if scaling_factor is not None:
        values["scaling_factor"] = scaling_factor
    elif values.get("scaling_factor") is None:
        raise ValueError("vae.scaling_factor is null: give vae_config, a diffusers configuration with a scaling_factor")
    config = vae_config_from_diffusers(values)
    if config.latent_channels != channels:
        raise ValueError(f"vae_config has latent_channels={config.latent_channels}, but the checkpoint {channels}")
    return config


def config_to_official(config: FlexTokConfig) -> dict[str, Any]:
    """The official configuration of a model, as plain data; ValueError if the official code cannot express it."""
    facts = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    grid = config.layout == "grid"
    parts = parts_of(Variant(grid, nested_dropout=config.missing_tokens == "mask"))
    known = fact_names(parts) | _SAID_OTHERWISE | _NOTES | ({"num_registers", "nested_dropout"} if grid else set())
    for field in dataclasses.fields(config):
        if field.name not in known and facts[field.name] != field.default:
            raise ValueError(
                f"{field.name}={facts[field.name]!r} does not exist in the official format; it must be "
                f"{field.default!r}, or save the model in our own format"
            )
    if config.missing_tokens == "mask" and config.nested_dropout not in LAWS:
        warnings.warn(
            f"nested_dropout={config.nested_dropout!r} does not exist in the official code; written as 'uniform'",
            stacklevel=4,
        )
        facts["nested_dropout"] = "uniform"
    facts |= {
        "scaling_factor": _expressible_vae(config.vae).scaling_factor,
        "patch_sizes": (config.patch_size,) * 2,
        "register_table": (config.num_registers,),
        "num_levels": len(config.fsq_levels),
        "repa_layers": () if config.repa_layer is None else (config.repa_layer,),
        "logit_normal": config.timestep_law == "logit_normal",
        "mode_scale": 0.0 if config.timestep_law == "uniform" else config.mode_scale,
    }
    official = write(facts, TOP, parts)
    if config.repa_layer is None:
        modules = official["decoder"]["module_dict"]
        del modules["dec_repa_unpacker"], modules["dec_transformer"]["intermediate_layer_write_key"]
    return official


def _expressible_vae(vae: VAEConfig | None) -> VAEConfig:
    if vae is None or vae.kind != "kl":
        kind = "none" if vae is None else vae.kind
        raise ValueError(f"vae.kind={kind!r} does not exist in the official format; it needs a 'kl' autoencoder")
    if vae.shift_factor:
        raise ValueError(f"vae.shift_factor={vae.shift_factor} does not exist in the official format; it must be 0")
    values, published = vars(vae_config_from_diffusers(vae_config_to_diffusers(vae))), vars(PUBLISHED_VAE)
    for name in values:
        if name not in _OF_VAE_SHOWN and values[name] != published[name]:
            warnings.warn(
                f"vae.{name}={values[name]}: the official code always builds an autoencoder with {published[name]}; "
                "this file needs the autoencoder's configuration beside it",
                stacklevel=5,
            )
    return vae
