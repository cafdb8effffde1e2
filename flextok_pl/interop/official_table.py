"""The modules of the official code's configuration and the options of each: what is read from it, and what is written.

From the constructors at https://github.com/apple/ml-flextok/tree/87d00cc8babf4a25ffce0f3f0c4d8b529d3d6abf.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flextok_pl.interop.official_schema import (
    ANY,
    REQUIRED,
    Fact,
    Fixed,
    Function,
    Module,
    Part,
    Sequence,
    Training,
    fixed,
)

TOP = "flextok.flextok_wrapper.FlexTok"
_MODEL = "flextok.model"
_WRAPPER = f"{_MODEL}.utils.wrappers.SequentialModuleDictWrapper"
_UNPACKER = f"{_MODEL}.postprocessors.seq_unpacking.SequenceUnpacker"
_HEADS = f"{_MODEL}.postprocessors.heads"
_PRECISIONS = (None, "fp32", "float32")
_INIT = {"weight_init_style": ANY}
_ENC_DIM, _DEC_DIM = {"dim": Fact("encoder_width", "size")}, {"dim": Fact("decoder_width", "size")}
_PATCHES, _REGISTERS = "dec_patches", "dec_registers_proj"
_ENC_PATCHES = "enc_vae_latents_patched"


def _permutation(read_key: str, write_key: str, operation: str) -> Module:
    function = Function(f"{_MODEL}.utils.dict_ops.{operation}")
    options = {"read_key": read_key, "write_key": write_key, "per_sample_op": function}
    return Module(f"{_MODEL}.utils.dict_ops.PerSampleOp", options)


def _patching(dim: Mapping[str, Any], read_key: str, write_key: str, count_key: str) -> Module:
    options = {
        "input_tensor_list_read_key": read_key,
        "patches_list_write_key": write_key,
        "n_patches_write_key": count_key,
        "channels_in": Fact("latent_channels", "size"),
        **dim,
        "patch_sizes": Fact("patch_sizes", "sizes"),
        "flatten_patches": fixed(False, default=True),
    }
    return Module(f"{_MODEL}.preprocessors.patching.PatchEmbedder", options, also=_INIT)


def _positions(dim: Mapping[str, Any], read_key: str, write_key: str, sizes: str, kind: Fixed) -> Module:
    options = {
        "read_key": read_key,
        "write_key": write_key,
        **dim,
        "max_sizes": Fact(sizes, "sizes"),
        "posemb_type": kind,
        "posemb_scaling": fixed("absolute"),
    }
    return Module(f"{_MODEL}.utils.posembs.PositionalEmbeddingAdder", options)


def _packer(side: str, parts: list[str], options: Mapping[str, Any], also: Mapping[str, Any]) -> Module:
    written = {
        "input_list_read_keys": parts,
        "packed_seq_write_key": f"{side}_packed_seq",
        "block_mask_write_key": f"{side}_block_mask",
        "inner_packed_shapes_write_key": f"{side}_ps_inner",
        "outer_packed_shapes_write_key": f"{side}_ps_outer",
        "pad_to_multiple": 128,
    }
    ignored = dict.fromkeys(("max_seq_len", "compile_block_mask", "return_materialized_mask"), ANY)
    target = f"{_MODEL}.preprocessors.flex_seq_packing.BlockWiseSequencePacker"
    return Module(target, {**written, **options}, {**ignored, **also})


def _unpacker(side: str, packed_key: str, parts: list[str]) -> Module:
    options = {
        "packed_seq_read_key": packed_key,
        "inner_seq_write_keys": parts,
        "inner_packed_shapes_read_key": f"{side}_ps_inner",
        "outer_packed_shapes_read_key": f"{side}_ps_outer",
    }
    return Module(_UNPACKER, options)


def _transformer(side: str, options: Mapping[str, Any], also: Mapping[str, Any]) -> Module:
    name = {"enc": "encoder", "dec": "decoder"}[side]
    written = {
        "input_seq_read_key": f"{side}_packed_seq",
        "output_seq_write_key": f"{side}_packed_seq",
        "dim": Fact(f"{name}_width", "size", 768),
        "depth": Fact(f"{name}_depth", "size", 12),
        "head_dim": Fact(f"{name}_head_dim", "size", 64),
        "mlp_ratio": Fact("mlp_ratio", "positive", 4.0),
        "block_mask_read_key": f"{side}_block_mask",
        "use_act_checkpoint": True,
    }
    unwritten = {
        **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), fixed(False)),
        **dict.fromkeys(("gated_mlp", "qk_norm"), fixed(True)),
        **dict.fromkeys(("score_mod_read_key", "rope_forward_read_key"), fixed(None)),
        **dict.fromkeys(("drop", "drop_path_rate"), Training(0.0)),
        **dict.fromkeys(("weight_init_style", "zero_init_query_proj"), ANY),
    }
    target = f"{_MODEL}.trunks.transformers.FlexTransformer"
    return Module(target, {**written, **options}, {**unwritten, **also})


def _head(kind: str, key: str, dim: Mapping[str, Any], options: Mapping[str, Any], also: Mapping[str, Any]) -> Module:
    """A head; its precision is `also` or among the options."""
    written = {
        "read_key": key,
        "write_key": key,
        **dim,
        "use_mup_readout": fixed(False, default=REQUIRED),
        "weight_init_style": "zero",
    }
    biases = dict.fromkeys(("proj_bias", "adaLN_bias"), fixed(True))
    return Module(f"{_HEADS}.{kind}", {**written, **options}, {**biases, **also})


_ENCODER = {
    "enc_channels_to_last": _permutation("vae_latents", "vae_latents_bhwc", "channels_first_to_last"),
    "enc_patch_emb": _patching(_ENC_DIM, "vae_latents_bhwc", _ENC_PATCHES, "enc_n_patches"),
    "enc_posemb_module": _positions(_ENC_DIM, _ENC_PATCHES, _ENC_PATCHES, "grid_size", fixed("sincos")),
    "enc_register_module": Module(
        f"{_MODEL}.preprocessors.registers.Registers1D",
        {
            "input_tensor_list_read_key": _ENC_PATCHES,
            "register_sizes_read_write_key": "register_sizes",
            "registers_write_key": "enc_registers",
            **_ENC_DIM,
            "n_min": Fact("num_registers", "size"),
            "n_max": Fact("num_registers", "size"),
            "size_sampling_mode": "uniform",  # of no effect where n_min = n_max
            "ordering_mode": fixed("nested"),
        },
        also={
            "n_eval": Fact("num_registers", "size?", None),
            **dict.fromkeys(("extra_registers_write_key", "extra_registers_dim"), fixed(None)),
        },
    ),
    "enc_seq_packer": _packer(
        "enc",
        [_ENC_PATCHES, "enc_registers"],
        {"mask_mode": fixed("causal_last", default="full")},
        {"per_subseq_embs": ANY},
    ),
    "enc_transformer": _transformer(
        "enc",
        {},
        {
            "intermediate_layers": Fact("", "indices?", None),
            "adaLN_expansion": fixed(1, 2),
            "adaLN_emb_read_key": fixed(None),
        },
    ),
    "enc_unpacker": _unpacker("enc", "enc_packed_seq", [_ENC_PATCHES, "enc_registers"]),
    "enc_to_latents": _head(
        "LinearHead",
        "enc_registers",
        _ENC_DIM,
        {"dim_out": Fact("num_levels", "size"), "dtype_override": fixed(*_PRECISIONS)},
        {"adaLN_emb_read_key": fixed(None)},
    ),
}

_DECODER = {
    "dec_from_latents": Module(
        f"{_MODEL}.preprocessors.linear.LinearLayer",
        {
            "read_key": "enc_registers_quant",
            "write_key": _REGISTERS,
            "dim_in": Fact("num_levels", "size"),
            **_DEC_DIM,
        },
        also={"proj_bias": fixed(True), "dtype_override": fixed(*_PRECISIONS), **_INIT},
    ),
    # With a single axis, the sum and the product over axes are the same table.
    "dec_registers_posemb_module": _positions(
        _DEC_DIM, _REGISTERS, _REGISTERS, "register_table", fixed("learnable_sum", "learnable_prod", default="sincos")
    ),
    "dec_nested_dropout": Module(
        f"{_MODEL}.preprocessors.token_dropout.MaskedNestedDropout",
        {
            "read_write_key": _REGISTERS,
            **_DEC_DIM,
            "size_sampling_mode": Fact("nested_dropout", "law", "uniform"),
        },
    ),
    "dec_latent_dropout": Module(
        f"{_MODEL}.preprocessors.nullcond.LearnedNullCond",
        {"read_write_key": _REGISTERS, **_DEC_DIM, "dropout_prob": Fact("null_dropout", "probability", 0.0)},
        also={"replace_with_single_token": fixed(False)},
    ),
    "dec_noise_channels_to_last": _permutation(
        "vae_latents_noised", "vae_latents_noised_bhwc", "channels_first_to_last"
    ),
    "dec_noise_patch_emb": _patching(
        _DEC_DIM, "vae_latents_noised_bhwc", "vae_latents_noised_patched", "dec_n_patches"
    ),
    "dec_patches_posemb_module": _positions(
        _DEC_DIM, "vae_latents_noised_patched", _PATCHES, "grid_size", fixed("sincos")
    ),
    "dec_seq_packer": _packer(
        "dec",
        [_PATCHES, _REGISTERS],
        {
            "emb_packing_fn_write_key": "emb_packing_fn",
            "mask_mode": fixed("full"),
            "per_subseq_embs": fixed(True, default=False),
        },
        {},
    ),
    "dec_time_embedder": Module(
        f"{_MODEL}.preprocessors.time_embedding.TimestepEmbedder",
        {
            "timesteps_read_key": "timesteps",
            "time_embedding_write_key": "dec_temb",
            **_DEC_DIM,
            "frequency_embedding_size": Fact("time_frequencies", "even", 256),
            "max_timestep": Fact("max_timestep", "positive", 1000.0),
        },
        also={"temb_as_tokens": fixed(False), **_INIT},
    ),
    "dec_transformer": _transformer(
        "dec",
        {
            "adaLN_emb_read_key": Fact("", "text", written="dec_temb"),
            "adaLN_packing_fn_read_key": "emb_packing_fn",
            "adaLN_expansion": fixed(2, default=REQUIRED),
            "intermediate_layer_write_key": "dec_packed_seq_repa_layer",
            "intermediate_layers": Fact("repa_layers", "indices?", None),
        },
        {},
    ),
    "dec_repa_unpacker": _unpacker("dec", "dec_packed_seq_repa_layer", ["dec_patches_repa_layer"]),
    "dec_unpacker": _unpacker("dec", "dec_packed_seq", [_PATCHES, _REGISTERS]),
    "dec_to_patches": _head(
        "ToPatchesLinearHead",
        _PATCHES,
        _DEC_DIM,
        {
            "channels_out": Fact("latent_channels", "size"),
            "patch_sizes": Fact("patch_sizes", "sizes"),
            "adaLN_emb_read_key": Fact("", "text", written="dec_temb"),
        },
        {"dtype_override": fixed(*_PRECISIONS)},
    ),
    "dec_channels_to_first": _permutation(_PATCHES, "vae_latents_reconst", "channels_last_to_first"),
}

PARTS: dict[str, Part] = {
    "vae": Module(
        "flextok.vae_wrapper.StableDiffusionVAE",
        {
            "images_read_key": "rgb",
            "vae_latents_read_key": "vae_latents_reconst",
            "vae_latents_write_key": "vae_latents",
            "images_reconst_write_key": "rgb_reconst",
            "vae_kl_loss_write_key": "kl_loss",
            "latent_channels": Fact("latent_channels", "size", 16),
            "scaling_factor": Fact("scaling_factor", "positive?", None),
            "dtype_override": fixed("fp32", "float32", None),
            "sample_posterior": False,
            "force_vae_encode": True,
            "frozen": True,
        },
        also={
            "learnable_logvar": fixed(False),
            **dict.fromkeys(("hf_hub_path", "logvar_init", "compile_encode_fn"), ANY),
        },
    ),
    "encoder": Sequence(_WRAPPER, _ENCODER),
    # What aligns the decoder with a teacher reads patches and changes nothing that is decoded.
    "decoder": Sequence(
        _WRAPPER, _DECODER, aside="repa", aside_targets=(_UNPACKER, f"{_HEADS}.MLPHead", f"{_HEADS}.LinearHead")
    ),
    "regularizer": Module(
        "flextok.regularizers.quantize_fsq.FSQ",
        {
            "latents_read_key": "enc_registers",
            "quants_write_key": "enc_registers_quant",
            "tokens_write_key": "tokens",
            "levels": Fact("fsq_levels", "sizes"),
            "drop_quant_p": Training(0.0),
            "packed_call": False,
        },
        also={
            "corrupt_tokens_p": Training(0.0),
            "min_corrupt_tokens_p": Training(None),
            "apply_corrupt_tokens_p": Training(0.2),
        },
    ),
    "flow_matching_noise_module": Module(
        "flextok.flow_matching.noise_modules.MinRFNoiseModule",
        {
            "clean_images_read_key": "vae_latents",
            "noised_images_write_key": "vae_latents_noised",
            "noise_write_key": "flow_noise",
            "timesteps_write_key": "timesteps",
            "sigmas_write_key": "sigmas",
            "ln": Fact("logit_normal", "flag", True),
            "stratisfied": Fact("stratified", "flag", False),
            "mode_scale": Fact("mode_scale", "number", 0.0),
        },
    ),
    "pipeline": Module(
        "flextok.flow_matching.pipelines.MinRFPipeline",
        {
            "_partial_": True,
            "target_sizes_read_key": None,
            "latents_read_key": "enc_registers_quant",
            "timesteps_read_key": "timesteps",
            "noised_images_read_key": "vae_latents_noised",
            "reconst_write_key": "vae_latents_reconst",
            "out_channels": Fact("latent_channels", "size?", None),
        },
    ),
}
