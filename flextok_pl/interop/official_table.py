"""The modules of the official code's configuration and their options, for reading and writing.

From the constructors at https://github.com/apple/ml-flextok/tree/87d00cc8babf4a25ffce0f3f0c4d8b529d3d6abf.
"""

from typing import Any, NamedTuple

from flextok_pl.interop.official_schema import REQUIRED, Module, Option, Part, Sequence, fact, fixed, training

TOP = "flextok.flextok_wrapper.FlexTok"
_MODEL = "flextok.model"
_HEADS = f"{_MODEL}.postprocessors.heads"
_OPERATIONS = f"{_MODEL}.utils.dict_ops"
_UNPACKER = f"{_MODEL}.postprocessors.seq_unpacking.SequenceUnpacker"
_WRAPPER = f"{_MODEL}.utils.wrappers.SequentialModuleDictWrapper"
# The classes that distinguish variants.
REGISTERS = f"{_MODEL}.preprocessors.registers.Registers1D"
NESTED_DROPOUT = f"{_MODEL}.preprocessors.token_dropout.MaskedNestedDropout"
POSITIONS, ADDITION = f"{_MODEL}.utils.posembs.PositionalEmbeddingAdder", f"{_OPERATIONS}.PerSampleReducer"

_ENCODER_WIDTH, _DECODER_WIDTH = fact("encoder_width", "size"), fact("decoder_width", "size")
_CHANNELS, _PATCH_SIZES = fact("latent_channels", "size"), fact("patch_sizes", "sizes")
_NUM_REGISTERS, _NUM_LEVELS = fact("num_registers", "size"), fact("num_levels", "size")
_TIME = fact("", "text")._replace(written="dec_temb")
_PRECISION = fixed(None, "fp32", "float32")

# Names of tensors that are passed between modules.
_NOISED, _PATCHES, _REGISTERS = "vae_latents_noised_patched", "dec_patches", "dec_registers_proj"
_ENC_PATCHES, _ENC_REGISTERS = "enc_vae_latents_patched", "enc_registers"
_GRID, _ENC_GRID = "dec_latents_proj", "enc_latents"  # used instead of registers


class Variant(NamedTuple):
    """Kind of official model that a configuration describes."""

    grid: bool = False  # 2-D tokens, without registers
    nested_dropout: bool = True  # in the decoder; always true with registers
    sum_first: bool = False  # tokens are added to a grid's patches before their positions, which is equivalent


def _permutation(read_key: str, write_key: str, operation: str) -> Module:
    function = Module(f"{_OPERATIONS}.{operation}", _partial_=True)
    return Module(f"{_OPERATIONS}.PerSampleOp", read_key=read_key, write_key=write_key, per_sample_op=function)


def _patching(width: Option, read_key: str, write_key: str, count_key: str) -> Module:
    return Module(
        f"{_MODEL}.preprocessors.patching.PatchEmbedder",
        input_tensor_list_read_key=read_key,
        patches_list_write_key=write_key,
        n_patches_write_key=count_key,
        channels_in=_CHANNELS,
        dim=width,
        patch_sizes=_PATCH_SIZES,
        flatten_patches=fixed(False, default=True),
    ).taking("weight_init_style")


def _positions(width: Option, read_key: str, write_key: str, sizes: str, kind: Option) -> Module:
    return Module(
        POSITIONS,
        read_key=read_key,
        write_key=write_key,
        dim=width,
        max_sizes=fact(sizes, "sizes"),
        posemb_type=kind,
        posemb_scaling=fixed("absolute"),
    )


def _packer(side: str, parts: list[str], **options: Any) -> Module:
    return Module(
        f"{_MODEL}.preprocessors.flex_seq_packing.BlockWiseSequencePacker",
        input_list_read_keys=parts,
        packed_seq_write_key=f"{side}_packed_seq",
        block_mask_write_key=f"{side}_block_mask",
        inner_packed_shapes_write_key=f"{side}_ps_inner",
        outer_packed_shapes_write_key=f"{side}_ps_outer",
        pad_to_multiple=128,
        **options,
    ).taking("max_seq_len", "compile_block_mask", "return_materialized_mask")


def _unpacker(side: str, packed_key: str, parts: list[str]) -> Module:
    return Module(
        _UNPACKER,
        packed_seq_read_key=packed_key,
        inner_seq_write_keys=parts,
        inner_packed_shapes_read_key=f"{side}_ps_inner",
        outer_packed_shapes_read_key=f"{side}_ps_outer",
    )


def _transformer(side: str, name: str, **options: Any) -> Module:
    return Module(
        f"{_MODEL}.trunks.transformers.FlexTransformer",
        input_seq_read_key=f"{side}_packed_seq",
        output_seq_write_key=f"{side}_packed_seq",
        dim=fact(f"{name}_width", "size", 768),
        depth=fact(f"{name}_depth", "size", 12),
        head_dim=fact(f"{name}_head_dim", "size", 64),
        mlp_ratio=fact("mlp_ratio", "positive", 4.0),
        block_mask_read_key=f"{side}_block_mask",
        use_act_checkpoint=True,
        **options,
    ).taking(
        "weight_init_style",
        "zero_init_query_proj",
        **dict.fromkeys(("qkv_bias", "proj_bias", "mlp_bias"), fixed(False)),
        **dict.fromkeys(("gated_mlp", "qk_norm"), fixed(True)),
        **dict.fromkeys(("score_mod_read_key", "rope_forward_read_key"), fixed(None)),
        **dict.fromkeys(("drop", "drop_path_rate"), training(0.0)),
    )


def _head(kind: str, width: Option, read_key: str, write_key: str, **options: Any) -> Module:
    return Module(
        f"{_HEADS}.{kind}",
        read_key=read_key,
        write_key=write_key,
        dim=width,
        use_mup_readout=fixed(False, default=REQUIRED),
        weight_init_style="zero",
        **options,
    ).taking(proj_bias=fixed(True), adaLN_bias=fixed(True), dtype_override=_PRECISION)


def _encoder(grid: bool) -> dict[str, Module]:
    coded = _ENC_PATCHES if grid else _ENC_REGISTERS
    parts = [_ENC_PATCHES] if grid else [_ENC_PATCHES, _ENC_REGISTERS]
    registers = Module(
        REGISTERS,
        input_tensor_list_read_key=_ENC_PATCHES,
        register_sizes_read_write_key="register_sizes",
        registers_write_key=_ENC_REGISTERS,
        dim=_ENCODER_WIDTH,
        n_min=_NUM_REGISTERS,
        n_max=_NUM_REGISTERS,
        size_sampling_mode="uniform",  # has no effect with n_min = n_max
        ordering_mode=fixed("nested"),
    ).taking(
        n_eval=fact("num_registers", "size?", None),
        extra_registers_write_key=fixed(None),
        extra_registers_dim=fixed(None),
    )
    return {
        "enc_channels_to_last": _permutation("vae_latents", "vae_latents_bhwc", "channels_first_to_last"),
        "enc_patch_emb": _patching(_ENCODER_WIDTH, "vae_latents_bhwc", _ENC_PATCHES, "enc_n_patches"),
        "enc_posemb_module": _positions(_ENCODER_WIDTH, _ENC_PATCHES, _ENC_PATCHES, "grid_size", fixed("sincos")),
        **({} if grid else {"enc_register_module": registers}),
        "enc_seq_packer": _packer(
            "enc", parts, mask_mode=fixed("full") if grid else fixed("causal_last", default="full")
        ).taking("per_subseq_embs"),
        "enc_transformer": _transformer("enc", "encoder").taking(
            intermediate_layers=fact("", "indices?", None), adaLN_expansion=fixed(1, 2), adaLN_emb_read_key=fixed(None)
        ),
        "enc_unpacker": _unpacker("enc", "enc_packed_seq", parts),
        "enc_to_latents": _head(
            "LinearHead",
            _ENCODER_WIDTH,
            coded,
            _ENC_GRID if grid else coded,
            dim_out=_NUM_LEVELS,
            dtype_override=_PRECISION,
        ).taking(adaLN_emb_read_key=fixed(None)),
    }


def _tokens(variant: Variant) -> dict[str, Module]:
    """The modules that make the decoder's tokens from the codes."""
    key = _GRID if variant.grid else _REGISTERS
    embedding = Module(
        f"{_MODEL}.preprocessors.linear.LinearLayer",
        read_key=f"{_ENC_GRID if variant.grid else _ENC_REGISTERS}_quant",
        write_key=key,
        dim_in=_NUM_LEVELS,
        dim=_DECODER_WIDTH,
    ).taking("weight_init_style", proj_bias=fixed(True), dtype_override=_PRECISION)
    # With a single axis, the sum and the product over axes are the same table.
    kind = fixed("learnable_sum", "learnable_prod", default="sincos")
    positions = _positions(_DECODER_WIDTH, key, key, "register_table", kind)
    nested_dropout = Module(
        NESTED_DROPOUT,
        read_write_key=key,
        dim=_DECODER_WIDTH,
        size_sampling_mode=fact("nested_dropout", "law", "uniform"),
    )
    null_condition = Module(
        f"{_MODEL}.preprocessors.nullcond.LearnedNullCond",
        read_write_key=key,
        dim=_DECODER_WIDTH,
        dropout_prob=fact("null_dropout", "probability", 0.0),
    ).taking(replace_with_single_token=fixed(False))
    return {
        "dec_from_latents": embedding,
        **({} if variant.grid else {"dec_registers_posemb_module": positions}),
        **({"dec_nested_dropout": nested_dropout} if variant.nested_dropout else {}),
        "dec_latent_dropout": null_condition,
    }


def _patches(variant: Variant) -> dict[str, Module]:
    """The modules that make the decoder's patches from noised latents, and add a grid's tokens to them."""
    embedding = {
        "dec_noise_channels_to_last": _permutation(
            "vae_latents_noised", "vae_latents_noised_bhwc", "channels_first_to_last"
        ),
        "dec_noise_patch_emb": _patching(_DECODER_WIDTH, "vae_latents_noised_bhwc", _NOISED, "dec_n_patches"),
    }
    read_key = _PATCHES if variant.sum_first else _NOISED
    write_key = _NOISED if variant.grid and not variant.sum_first else _PATCHES
    positions = {
        "dec_patches_posemb_module": _positions(_DECODER_WIDTH, read_key, write_key, "grid_size", fixed("sincos"))
    }
    addition = {
        "dec_add_noise_and_latents": Module(
            ADDITION,
            read_keys=[_NOISED, _GRID],
            write_key=_PATCHES,
            per_sample_op=Module(f"{_OPERATIONS}.sum_tensors", _partial_=True),
        )
    }
    if not variant.grid:
        return embedding | positions
    return embedding | addition | positions if variant.sum_first else embedding | positions | addition


def _decoder(variant: Variant) -> dict[str, Module]:
    grid, parts = variant.grid, [_PATCHES] if variant.grid else [_PATCHES, _REGISTERS]
    return {
        **_tokens(variant),
        **_patches(variant),
        "dec_seq_packer": _packer(
            "dec",
            parts,
            emb_packing_fn_write_key="emb_packing_fn",
            mask_mode=fixed("full"),
            per_subseq_embs=fixed(False, True) if grid else fixed(True, default=False),
        ),
        "dec_time_embedder": Module(
            f"{_MODEL}.preprocessors.time_embedding.TimestepEmbedder",
            timesteps_read_key="timesteps",
            time_embedding_write_key="dec_temb",
            dim=_DECODER_WIDTH,
            frequency_embedding_size=fact("time_frequencies", "even", 256),
            max_timestep=fact("max_timestep", "positive", 1000.0),
        ).taking("weight_init_style", temb_as_tokens=fixed(False)),
        "dec_transformer": _transformer(
            "dec",
            "decoder",
            adaLN_emb_read_key=_TIME,
            adaLN_packing_fn_read_key="emb_packing_fn",
            adaLN_expansion=fixed(1) if grid else fixed(2, default=REQUIRED),
            intermediate_layer_write_key="dec_packed_seq_repa_layer",
            intermediate_layers=fact("repa_layers", "indices?", None),
        ),
        "dec_repa_unpacker": _unpacker("dec", "dec_packed_seq_repa_layer", ["dec_patches_repa_layer"]),
        "dec_unpacker": _unpacker("dec", "dec_packed_seq", parts),
        "dec_to_patches": _head(
            "ToPatchesLinearHead",
            _DECODER_WIDTH,
            _PATCHES,
            _PATCHES,
            channels_out=_CHANNELS,
            patch_sizes=_PATCH_SIZES,
            adaLN_emb_read_key=_TIME,
        ),
        "dec_channels_to_first": _permutation(_PATCHES, "vae_latents_reconst", "channels_last_to_first"),
    }


def parts_of(variant: Variant) -> dict[str, Part]:
    """The parts of an official configuration, in the order in which they are written."""
    grid = variant.grid
    codes = _ENC_GRID if grid else _ENC_REGISTERS
    vae = Module(
        "flextok.vae_wrapper.StableDiffusionVAE",
        images_read_key="rgb",
        vae_latents_read_key="vae_latents_reconst",
        vae_latents_write_key="vae_latents",
        images_reconst_write_key="rgb_reconst",
        vae_kl_loss_write_key="kl_loss",
        latent_channels=fact("latent_channels", "size", 16),
        scaling_factor=fact("scaling_factor", "positive?", None),
        dtype_override=fixed("fp32", "float32", None),
        sample_posterior=False,
        force_vae_encode=True,
        frozen=True,
    ).taking("hf_hub_path", "logvar_init", "compile_encode_fn", learnable_logvar=fixed(False))
    regularizer = Module(
        "flextok.regularizers.quantize_fsq.FSQ",
        latents_read_key=codes,
        quants_write_key=f"{codes}_quant",
        tokens_write_key="tokens",
        levels=fact("fsq_levels", "sizes"),
        drop_quant_p=training(0.0),
        packed_call=fixed(False, default=True) if grid else False,  # if packed, it takes a raster's columns for codes
    ).taking(corrupt_tokens_p=training(0.0), min_corrupt_tokens_p=training(None), apply_corrupt_tokens_p=training(0.2))
    noise = Module(
        "flextok.flow_matching.noise_modules.MinRFNoiseModule",
        clean_images_read_key="vae_latents",
        noised_images_write_key="vae_latents_noised",
        noise_write_key="flow_noise",
        timesteps_write_key="timesteps",
        sigmas_write_key="sigmas",
        ln=fact("logit_normal", "flag", True),
        stratisfied=fact("stratified", "flag", False),
        mode_scale=fact("mode_scale", "number", 0.0),
    )
    pipeline = Module(
        "flextok.flow_matching.pipelines.MinRFPipeline",
        _partial_=True,
        target_sizes_read_key=None,
        latents_read_key=f"{codes}_quant",
        timesteps_read_key="timesteps",
        noised_images_read_key="vae_latents_noised",
        reconst_write_key="vae_latents_reconst",
        out_channels=fact("latent_channels", "size?", None),
    )
    # Alignment of the decoder with a teacher reads patches and does not change what is decoded.
    aside = ("repa", (_UNPACKER, f"{_HEADS}.MLPHead", f"{_HEADS}.LinearHead"))
    return {
        "vae": vae,
        "encoder": Sequence(_WRAPPER, _encoder(grid), by_flow=grid),
        "decoder": Sequence(_WRAPPER, _decoder(variant), *aside, by_flow=grid),
        "regularizer": regularizer,
        "flow_matching_noise_module": noise,
        "pipeline": pipeline,
    }
