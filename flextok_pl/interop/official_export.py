"""`FlexTokConfig` -> the configuration that the official code instantiates."""

from __future__ import annotations

import warnings
from typing import Any

import flextok_pl.interop.official_schema as schema
from flextok_pl.config import FlexTokConfig, VAEConfig
from flextok_pl.interop.official_config import PUBLISHED_VAE

_OPERATIONS = "flextok.model.utils.dict_ops"


def config_to_official(config: FlexTokConfig) -> dict[str, Any]:
    """The official configuration of a model, as plain data.

    Args:
        config: of a tokenizer with a `kl` VAE.

    Raises:
        ValueError: the official code cannot express the model.
    """
    for name, theirs in (("layout", "registers"), ("causal_registers", True), ("objective", "flow")):
        if getattr(config, name) != theirs:
            raise ValueError(
                f"{name}={getattr(config, name)!r} does not exist in the official format; it must be {theirs!r}, or "
                "save the model with save_pretrained"
            )
    vae = _expressible_vae(config)
    return {
        "_target_": "flextok.flextok_wrapper.FlexTok",
        "vae": {
            "_target_": schema.VAE.target,
            "images_read_key": "rgb",
            "vae_latents_read_key": "vae_latents_reconst",
            "vae_latents_write_key": "vae_latents",
            "images_reconst_write_key": "rgb_reconst",
            "vae_kl_loss_write_key": "kl_loss",
            "latent_channels": config.latent_channels,
            "scaling_factor": vae.scaling_factor,
            "dtype_override": "fp32",
            "sample_posterior": False,
            "force_vae_encode": True,
            "frozen": True,
        },
        "encoder": _sequence(schema.ENCODER, _encoder_options(config)),
        "decoder": _sequence(_decoder_modules(config), _decoder_options(config)),
        "regularizer": {
            "_target_": schema.REGULARIZER.target,
            "latents_read_key": "enc_registers",
            "quants_write_key": "enc_registers_quant",
            "tokens_write_key": "tokens",
            "levels": list(config.fsq_levels),
            "drop_quant_p": 0.0,
            "packed_call": False,
        },
        "flow_matching_noise_module": {
            "_target_": schema.NOISE.target,
            "clean_images_read_key": "vae_latents",
            "noised_images_write_key": "vae_latents_noised",
            "noise_write_key": "flow_noise",
            "timesteps_write_key": "timesteps",
            "sigmas_write_key": "sigmas",
            "ln": config.timestep_law == "logit_normal",
            "stratisfied": config.stratified,
            "mode_scale": 0.0 if config.timestep_law == "uniform" else config.mode_scale,
        },
        "pipeline": {
            "_target_": schema.PIPELINE.target,
            "_partial_": True,
            "target_sizes_read_key": None,
            "latents_read_key": "enc_registers_quant",
            "timesteps_read_key": "timesteps",
            "noised_images_read_key": "vae_latents_noised",
            "reconst_write_key": "vae_latents_reconst",
            "out_channels": config.latent_channels,
        },
    }


def _expressible_vae(config: FlexTokConfig) -> VAEConfig:
    vae = config.vae
    if vae is None or vae.kind != "kl":
        kind = "none" if vae is None else vae.kind
        raise ValueError(f"vae.kind={kind!r} does not exist in the official format; it needs a 'kl' autoencoder")
    if vae.shift_factor:
        raise ValueError(f"vae.shift_factor={vae.shift_factor} does not exist in the official format; it must be 0")
    for name in ("block_out_channels", "layers_per_block", "norm_num_groups"):
        if getattr(vae, name) != getattr(PUBLISHED_VAE, name):
            warnings.warn(
                f"vae.{name}={getattr(vae, name)}: the official code always builds an autoencoder with "
                f"{getattr(PUBLISHED_VAE, name)}; this file needs the autoencoder's configuration beside it",
                stacklevel=4,
            )
    return vae


def _sequence(modules: dict[str, schema.Module], options: dict[str, dict[str, Any]]) -> dict[str, Any]:
    entries = {name: {"_target_": module.target, **options[name]} for name, module in modules.items()}
    return {"_target_": schema.WRAPPER, "module_dict": entries}


def _decoder_modules(config: FlexTokConfig) -> dict[str, schema.Module]:
    modules: dict[str, schema.Module] = {}
    for name, module in schema.DECODER.items():
        if name == "dec_unpacker" and config.repa_layer is not None:
            modules["dec_repa_unpacker"] = module
        modules[name] = module
    return modules


def _encoder_options(config: FlexTokConfig) -> dict[str, dict[str, Any]]:
    dim = config.encoder_width
    return {
        "enc_channels_to_last": _permutation("vae_latents", "vae_latents_bhwc", "channels_first_to_last"),
        "enc_patch_emb": _patching(config, dim, "vae_latents_bhwc", "enc_vae_latents_patched", "enc_n_patches"),
        "enc_posemb_module": _grid_positions(config, dim, "enc_vae_latents_patched", "enc_vae_latents_patched"),
        "enc_register_module": {
            "input_tensor_list_read_key": "enc_vae_latents_patched",
            "register_sizes_read_write_key": "register_sizes",
            "registers_write_key": "enc_registers",
            "dim": dim,
            "n_min": config.num_registers,
            "n_max": config.num_registers,
            "size_sampling_mode": "uniform",
            "ordering_mode": "nested",
        },
        "enc_seq_packer": {
            "input_list_read_keys": ["enc_vae_latents_patched", "enc_registers"],
            **_packing("enc"),
            "mask_mode": "causal_last",
            "pad_to_multiple": 128,
        },
        "enc_transformer": {
            "input_seq_read_key": "enc_packed_seq",
            "output_seq_write_key": "enc_packed_seq",
            "dim": dim,
            "depth": config.encoder_depth,
            "head_dim": config.encoder_head_dim,
            "mlp_ratio": config.mlp_ratio,
            "block_mask_read_key": "enc_block_mask",
            "use_act_checkpoint": True,
        },
        "enc_unpacker": _unpacking("enc", "enc_packed_seq", ["enc_vae_latents_patched", "enc_registers"]),
        "enc_to_latents": {
            "read_key": "enc_registers",
            "write_key": "enc_registers",
            "dim": dim,
            "dim_out": len(config.fsq_levels),
            "use_mup_readout": False,
            "weight_init_style": "zero",
            "dtype_override": None,
        },
    }


def _decoder_options(config: FlexTokConfig) -> dict[str, dict[str, Any]]:
    dim, registers = config.decoder_width, "dec_registers_proj"
    law = config.nested_dropout
    if law not in ("uniform", "pow2", "uniform_pow2"):
        warnings.warn(f"nested_dropout={law!r} does not exist in the official code; written as 'uniform'", stacklevel=4)
        law = "uniform"
    repa = {} if config.repa_layer is None else {"intermediate_layer_write_key": "dec_packed_seq_repa_layer"}
    return {
        "dec_from_latents": {
            "read_key": "enc_registers_quant",
            "write_key": registers,
            "dim_in": len(config.fsq_levels),
            "dim": dim,
        },
        "dec_registers_posemb_module": {
            "read_key": registers,
            "write_key": registers,
            "dim": dim,
            "max_sizes": [config.num_registers],
            "posemb_type": "learnable_sum",
            "posemb_scaling": "absolute",
        },
        "dec_nested_dropout": {"read_write_key": registers, "dim": dim, "size_sampling_mode": law},
        "dec_latent_dropout": {"read_write_key": registers, "dim": dim, "dropout_prob": config.null_dropout},
        "dec_noise_channels_to_last": _permutation(
            "vae_latents_noised", "vae_latents_noised_bhwc", "channels_first_to_last"
        ),
        "dec_noise_patch_emb": _patching(
            config, dim, "vae_latents_noised_bhwc", "vae_latents_noised_patched", "dec_n_patches"
        ),
        "dec_patches_posemb_module": _grid_positions(config, dim, "vae_latents_noised_patched", "dec_patches"),
        "dec_seq_packer": {
            "input_list_read_keys": ["dec_patches", registers],
            **_packing("dec"),
            "emb_packing_fn_write_key": "emb_packing_fn",
            "mask_mode": "full",
            "pad_to_multiple": 128,
            "per_subseq_embs": True,
        },
        "dec_time_embedder": {
            "timesteps_read_key": "timesteps",
            "time_embedding_write_key": "dec_temb",
            "dim": dim,
            "frequency_embedding_size": config.time_frequencies,
            "max_timestep": config.max_timestep,
        },
        "dec_transformer": {
            "input_seq_read_key": "dec_packed_seq",
            "output_seq_write_key": "dec_packed_seq",
            "dim": dim,
            "depth": config.decoder_depth,
            "head_dim": config.decoder_head_dim,
            "mlp_ratio": config.mlp_ratio,
            "block_mask_read_key": "dec_block_mask",
            "adaLN_emb_read_key": "dec_temb",
            "adaLN_packing_fn_read_key": "emb_packing_fn",
            "adaLN_expansion": 2,
            "use_act_checkpoint": True,
            **repa,
            "intermediate_layers": [] if config.repa_layer is None else [config.repa_layer],
        },
        "dec_repa_unpacker": _unpacking("dec", "dec_packed_seq_repa_layer", ["dec_patches_repa_layer"]),
        "dec_unpacker": _unpacking("dec", "dec_packed_seq", ["dec_patches", registers]),
        "dec_to_patches": {
            "read_key": "dec_patches",
            "write_key": "dec_patches",
            "dim": dim,
            "channels_out": config.latent_channels,
            "patch_sizes": [config.patch_size] * 2,
            "use_mup_readout": False,
            "weight_init_style": "zero",
            "adaLN_emb_read_key": "dec_temb",
        },
        "dec_channels_to_first": _permutation("dec_patches", "vae_latents_reconst", "channels_last_to_first"),
    }


def _permutation(read: str, write: str, operation: str) -> dict[str, Any]:
    function = {"_target_": f"{_OPERATIONS}.{operation}", "_partial_": True}
    return {"read_key": read, "write_key": write, "per_sample_op": function}


def _patching(config: FlexTokConfig, dim: int, read: str, write: str, count: str) -> dict[str, Any]:
    return {
        "input_tensor_list_read_key": read,
        "patches_list_write_key": write,
        "n_patches_write_key": count,
        "channels_in": config.latent_channels,
        "dim": dim,
        "patch_sizes": [config.patch_size] * 2,
        "flatten_patches": False,
    }


def _grid_positions(config: FlexTokConfig, dim: int, read: str, write: str) -> dict[str, Any]:
    return {
        "read_key": read,
        "write_key": write,
        "dim": dim,
        "max_sizes": list(config.grid_size),
        "posemb_type": "sincos",
        "posemb_scaling": "absolute",
    }


def _packing(side: str) -> dict[str, Any]:
    return {
        "packed_seq_write_key": f"{side}_packed_seq",
        "block_mask_write_key": f"{side}_block_mask",
        "inner_packed_shapes_write_key": f"{side}_ps_inner",
        "outer_packed_shapes_write_key": f"{side}_ps_outer",
    }


def _unpacking(side: str, packed: str, parts: list[str]) -> dict[str, Any]:
    return {
        "packed_seq_read_key": packed,
        "inner_seq_write_keys": parts,
        "inner_packed_shapes_read_key": f"{side}_ps_inner",
        "outer_packed_shapes_read_key": f"{side}_ps_outer",
    }
