"""Write `PriorConfig` as the configuration of a FlexAR release, which names the published classes.

Source of their names: https://github.com/EPFL-VILAB/search-over-tokens/tree/e7564c5 (`flextok_ar`) and
https://github.com/apple/ml-l3m/tree/e6376a3 (`l3m`).
"""

from typing import Any

from flextok_pl.config import Activation, NormKind, PriorConfig
from flextok_pl.interop.flexar_config import LONGEST_TEXT, MODEL_TYPES, NOTES

_ACTIVATIONS: dict[Activation, dict[str, Any]] = {
    "silu": {"_target_": "torch.nn.SiLU"},
    "gelu": {"_target_": "torch.nn.GELU", "approximate": "none"},
    "gelu_tanh": {"_target_": "torch.nn.GELU", "approximate": "tanh"},
}
_NORMS: dict[NormKind, dict[str, Any]] = {
    "rms": {"_target_": "l3m.model.layers.normalization.RMSNorm"},
    "layer": {"_target_": "l3m.model.layers.normalization.LayerNormFP32"},
    "layer_no_bias": {"_target_": "l3m.model.layers.normalization.LPLayerNorm", "elementwise_bias": False},
}


def config_to_flexar(config: PriorConfig) -> dict[str, Any]:
    """The configuration as plain data; a ValueError names an option that the classes cannot express."""
    text = config.text_width is not None
    if not text and not config.num_classes:
        raise ValueError("num_classes=0 without text_width: published priors have a condition; save in our own format")
    models: dict[str, Any] = {}
    if config.tokenizer_id:
        models["image_tokenizer"] = {
            "_target_": "flextok_ar.model.integration.ImageResamplerTokenizer",
            "model_id": config.tokenizer_id,
            "token_grid_size": [config.num_tokens, 1],
        }
    if text:
        models["text_encoder"] = _text_encoder(config)
    models["ar_image_model"] = {
        "_target_": "l3m.model.meta_models.MetaModel",
        "preprocessor": _preprocessor(config),
        "trunk": _trunk(config, text),
        "postprocessor": {"_target_": "torch.nn.Identity"},
        "head": {
            "_target_": "l3m.model.heads.classifier.LinearClassifier",
            "read_key": "output_embeddings",
            "write_key": "image_logits",
            "in_features": config.width,
            "out_features": config.vocab_size,
            "use_layernorm": config.head_norm,
            "use_bias": config.head_bias,
        },
    }
    written = {
        "model": {"meta_model": {"_target_": "l3m.model.meta_models.InSeriesMetaModels", "models": models}},
        "generation": _generation(config, text),
    }
    notes = {key: getattr(config, key) for key in NOTES if getattr(config, key)}
    notes |= {"class_names": list(config.class_names)} if config.class_names else {}
    return written | ({"flextok_pl": notes} if notes else {})


def _partial(named: dict[str, Any], **options: Any) -> dict[str, Any]:
    """A class that the published code builds later, with further options."""
    return {**named, "_partial_": True, **options}


def _preprocessor(config: PriorConfig) -> dict[str, Any]:
    classes = {"num_classes": config.num_classes} if config.num_classes else {}
    return {
        "_target_": "flextok_ar.model.preprocessors.ARImageEmbedPreprocessor",
        "token_grid_size": [config.num_tokens, 1],
        "codebook_size": config.vocab_size,
        "embed_dim": config.width,
        "pos_embed_type": "sincos1d" if config.fixed_positions else "absolute",
        **classes,
        "class_target_key": "target",
        "inference_read_key": "pred_image_token_ids",
        "read_key": "image_token_ids",
        "write_key": ["input_embeddings", "target_token_ids"],
    }


def _trunk(config: PriorConfig, text: bool) -> dict[str, Any]:
    norm = _partial(_NORMS[config.norm], eps=config.norm_eps)
    activation = _partial(_ACTIVATIONS[config.activation])
    attention: dict[str, Any] = {
        "dim": config.width,
        "num_heads": config.width // config.head_dim,
        "qkv_bias": config.qkv_bias,
    }
    heads = _NORMS[config.qk_norm_kind or config.norm], config.qk_norm_eps or config.norm_eps
    qk_norm = {"qk_norm": _partial(heads[0], eps=heads[1])}
    own = {"is_causal": True, **(qk_norm if config.qk_norm else {})}
    if config.qk_scale is not None:
        own["qk_scale"] = config.qk_scale
    self_attention = _partial({"_target_": "l3m.model.layers.attention.EfficientAttention"}, **attention, **own)
    kind = "transformer_decoder.TransformerDecoder" if text else "transformer.Transformer"
    trunk: dict[str, Any] = {
        "_target_": f"l3m.model.trunks.{kind}",
        "read_key": "input_embeddings",
        "write_key": "output_embeddings",
        "embed_dim": config.width,
        "num_blocks": config.depth,
        "ffn_target": _ffn(config),
        **_hidden(config),
        "norm_layer": norm,
        "use_bias": config.bias,
        "post_trunk_norm": config.final_norm,
    }
    if not text:
        return trunk | {"act_layer": activation, "attn_target": self_attention}
    masked = {"self_attn_mask_read_key": "text_embeddings_mask"} if config.text_mask else {}
    return trunk | {
        "encoder_output_key": "text_embeddings",
        **masked,
        "block": _partial({"_target_": "l3m.model.trunks.transformer_decoder.DecoderBlock"}, act_layer=activation),
        "self_attn_target": self_attention,
        "cross_attn_target": _partial(
            {"_target_": "flextok_ar.model.attention.GeneralizedAttentionWithMask"},
            encoder_dim=config.width,
            **attention,
            **(qk_norm if config.cross_qk_norm else {}),
        ),
    }


def _ffn(config: PriorConfig) -> dict[str, Any]:
    if not config.gated:
        return _partial({"_target_": "l3m.model.layers.ffn.MLP"})
    name = {"silu": "SwiGLUFFN", "gelu": "GeGELU", "gelu_tanh": "GatedFFN"}[config.activation]
    return _partial({"_target_": f"l3m.model.layers.ffn.{name}"}, multiple_of=1)


def _hidden(config: PriorConfig) -> dict[str, Any]:
    """The hidden width of the MLP; gated classes use int(2 h / 3) of it."""
    hidden = config.hidden_width
    return {"mlp_ratio": config.mlp_ratio, "mlp_hidden_dim": -(-3 * hidden // 2) if config.gated else hidden}


def _text_encoder(config: PriorConfig) -> dict[str, Any]:
    assert config.text_width is not None
    if config.text_encoder in ("", "minilm"):
        raise ValueError(
            f"text_encoder={config.text_encoder!r} cannot be stated in a published configuration, which names a T5: a "
            "folder or a Hub id; save in our own format"
        )
    hidden = config.text_hidden_width or config.width
    own = hidden == config.text_width  # the published projection has only this hidden width
    sizes = (
        {"text_dim": config.text_width, "embed_dim": config.width}
        if own
        else {"in_features": config.text_width, "hidden_features": hidden, "out_features": config.width}
    )
    length = None if config.text_length == LONGEST_TEXT else config.text_length
    return {
        "_target_": "flextok_ar.model.text_encoder.T5EmbedderWithMLP",
        "t5_embedder": {
            "_target_": "flextok_ar.model.text_encoder.T5Embedder",
            "read_key": "text",
            "text_embeddings_write_key": "text_embeddings",
            "text_embeddings_mask_write_key": "text_embeddings_mask",
            "hf_hub_path": config.text_encoder,
            "encoder_seqlen_max": length if config.text_mask else config.text_length,
            "decoder_seqlen": config.num_tokens,
        },
        "mlp": {
            "_target_": "flextok_ar.model.text_encoder.TextToEmbedMLP" if own else "l3m.model.layers.ffn.MLP",
            **sizes,
            "act_layer": _partial(_ACTIVATIONS[config.text_activation]),
            "use_bias": config.text_bias,
        },
    }


def _generation(config: PriorConfig, text: bool) -> dict[str, Any]:
    own = config.generation
    values = {
        "cfg_factor": own.cfg_scale,
        "temperature": own.temperature,
        "top_k": own.top_k,
        "top_p": own.top_p,
        "timesteps": own.num_steps,
        "tokenizer_cfg_factor": own.guidance_scale,
        "tokenizer_perform_norm_guidance": None if own.guidance is None else own.guidance == "apg",
    }
    if own.temperature == 0:
        values |= {"sample": False, "temperature": None}
    known = {key: value for key, value in values.items() if value is not None}
    return {"model_type": MODEL_TYPES["text" if text else "class"], **known, "num_keep_tokens": config.num_tokens}
