"""Read the configuration of a FlexAR release, config.yaml, and compare it with its tensors -> `PriorConfig`.

Tensors decide everything that they show; there the configuration must agree or be silent. It decides everything else;
if it is silent on that too, the release is refused. Defaults are those of the published classes
(https://github.com/apple/ml-l3m/tree/e6376a3 and https://github.com/EPFL-VILAB/search-over-tokens/tree/e7564c5).
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flextok_pl.config import Activation, GenerationConfig, NormKind, PriorConfig
from flextok_pl.interop.flexar_section import BLOCKS, Section, Shapes
from flextok_pl.interop.interpolation import Resolver

MODELS = "model.meta_model.models"
PREPROCESSOR = "models.ar_image_model.preprocessor."
POST_TRUNK = "models.ar_image_model.trunk.post_trunk_norm."
HEAD = "models.ar_image_model.head."
TEXT_MLP = "models.text_encoder.mlp."
TOKENIZER = "EPFL-VILAB/flextok_d18_d28_dfn"  # default of releases that name none
LONGEST_TEXT = 512  # tokens, at which T5's tokenizers cut if there is no limit
NOTES = ("tokenizer", "started_from")  # our options that are stored, with class_names, under the key flextok_pl
MODEL_TYPES = {"text": "ar_text_to_image_model", "class": "ar_label_to_image_model"}

_NORM_EPS = {"RMSNorm": 1e-6, "LayerNorm": 1e-5, "LayerNormFP32": 1e-5, "LPLayerNorm": 1e-5, "Fp32LayerNorm": 1e-5}
_SELF_ATTENTION = ("EfficientAttention", "GenericAttention", "HFAttention", "DCLMAttention")
_SCALED = ("EfficientAttention",)  # the others ignore their qk_scale
_TAKES_MASK = ("GenericAttention", "DCLMAttention")  # for their own number of positions, so not for a text's
_CROSS_ATTENTION = ("GeneralizedAttentionWithMask", "GeneralizedAttention")
_GATED = {"SwiGLUFFN": "silu", "GeGELU": "gelu", "GatedFFN": None}  # with the activation that the class sets


def read_config(values: Resolver, shapes: Mapping[str, tuple[int, ...]], folder: Path) -> PriorConfig:
    """Read the configuration of a release; a ValueError names key and value that are not supported.

    A tokenizer and a text encoder in `folder` are named by their paths.
    """
    tensors = Shapes(shapes)
    Section("model.meta_model", {"_target_": values.get("model.meta_model._target_")}).name("InSeriesMetaModels")
    model = Section(f"{MODELS}.ar_image_model", values.get(f"{MODELS}.ar_image_model"))
    model.name("MetaModel")
    facts = _tokens(model.required("preprocessor"), tensors)
    text = f"{BLOCKS}0.cross_attn.Wq.weight" in tensors
    if text == (facts["num_classes"] > 0):
        what = "both" if text else "neither"
        raise ValueError(f"tensors show {what} of cross-attention over a text and class embeddings; it must be one")
    facts["depth"] = tensors.num_blocks()
    trunk = model.required("trunk")
    trunk.name("TransformerDecoder" if text else "Transformer")
    facts |= _blocks(trunk, tensors, facts["width"], facts["depth"], text)
    if text:
        encoder = Section(f"{MODELS}.text_encoder", values.get(f"{MODELS}.text_encoder"))
        facts |= _text(encoder, trunk, tensors, facts["width"], folder)
    else:
        trunk.take("self_attn_mask_read_key")
    trunk.close()
    facts |= _head(model.required("head"), tensors, facts["vocab_size"], facts["width"])
    after = model.part("postprocessor")
    if after is not None:
        after.name("Identity")
    model.close()
    facts["generation"] = _generation(values.get("generation"), "text" if text else "class")
    if values.get(f"{MODELS}.image_tokenizer._target_") is not None:
        own = (values.get(f"{MODELS}.image_tokenizer.{key}") for key in ("checkpoint_path", "model_id"))
        facts["tokenizer_id"] = _place(next((name for name in own if name), TOKENIZER), folder)
    return PriorConfig(**_as_ours(facts), **_notes(values.get("flextok_pl")))


def _tokens(section: Section, tensors: Shapes) -> dict[str, Any]:
    """Sizes, positions and classes."""
    section.name("ARImageEmbedPreprocessor")
    vocabulary, width = tensors.sizes(f"{PREPROCESSOR}embedding.weight", 2)
    section.must_be("codebook_size", vocabulary, "this is the number of token embeddings")
    section.must_be("embed_dim", width, "this is the width of token embeddings")
    kind = section.take("pos_embed_type")
    if kind not in ("absolute", "sincos1d", "sincos2d"):
        raise ValueError(f"{section.path}.pos_embed_type={kind} must be absolute, sincos1d or sincos2d")
    length, _ = tensors.sizes(f"{PREPROCESSOR}positional_embedding", 2)
    grid = section.take("token_grid_size", [length])
    if not isinstance(grid, list) or any(type(side) is not int for side in grid) or math.prod(grid) != length:
        raise ValueError(f"{section.path}.token_grid_size={grid} does not have the {length} positions of the tensors")
    classes = 0
    if f"{PREPROCESSOR}cls_embedding.weight" in tensors:
        classes, _ = tensors.sizes(f"{PREPROCESSOR}cls_embedding.weight", 2)
        section.must_be("num_classes", classes, "this is the number of class embeddings", silent=False)
    else:
        section.refuse("num_classes", "there are no class embeddings among the tensors")
    section.close("init_style", "cond_dropout_prob", "class_target_key", "inference_read_key", "read_key", "write_key")
    return {
        "vocab_size": vocabulary,
        "width": width,
        "num_tokens": length,
        "fixed_positions": kind != "absolute",
        "num_classes": classes,
        "null_class": "zero" if classes else "learned",
    }


def _blocks(trunk: Section, tensors: Shapes, width: int, depth: int, text: bool) -> dict[str, Any]:
    """Norms, attention and MLP of the blocks, which are all alike, and the norm after them."""
    trunk.must_be("embed_dim", width, "this is the width of token embeddings")
    trunk.must_be("num_blocks", depth, "this is the number of blocks")
    norm = trunk.part("norm_layer")
    facts: dict[str, Any] = {}
    if norm is None:
        facts["norm"], facts["norm_eps"] = "layer", 1e-6
    else:
        facts["norm"], facts["norm_eps"] = _norm(norm)
    _check_bias(tensors, f"{BLOCKS}0.norm_1", facts["norm"], f"{trunk.path}.norm_layer")
    attention = trunk.required("self_attn_target" if text else "attn_target")
    facts |= _self_attention(attention, tensors, width, "self_attn" if text else "attn")
    if text:
        facts |= _cross_attention(trunk.required("cross_attn_target"), tensors, width, facts)
    block = trunk.part("block")
    of_block = None
    if block is not None:
        block.name("DecoderBlock" if text else "Block")
        of_block = block.part("act_layer")  # the trunk overrides all others
    of_trunk = trunk.part("act_layer")
    # The decoder's trunk does not pass its activation to the blocks; the other trunk does.
    facts |= _mlp(trunk, tensors, width, of_block if text else of_trunk)
    out = "o_proj" if f"{_attn(text)}.o_proj.weight" in tensors else "proj"
    others = [f"{BLOCKS}0.cross_attn.proj.bias"] if text else []
    facts["bias"] = tensors.same_in(f"{_attn(text)}.{out}.bias", f"{BLOCKS}0.mlp.fc1.bias", *others)
    trunk.must_be("use_bias", facts["bias"], "tensors show it")
    facts["final_norm"] = f"{POST_TRUNK}weight" in tensors
    trunk.must_be("post_trunk_norm", facts["final_norm"], "tensors show it")
    trunk.ignore("read_key", "write_key", "drop_path_rate", "drop_path_type", "ffn_dropout_rate")
    trunk.ignore("weight_init_style", "gpt_proj_rescale")
    return facts


def _attn(text: bool) -> str:
    return f"{BLOCKS}0.{'self_attn' if text else 'attn'}"


def _norm(section: Section) -> tuple[NormKind, float]:
    """Kind and eps."""
    name = section.name(*_NORM_EPS)
    kind: NormKind = "rms" if name == "RMSNorm" else "layer"
    eps = section.number("eps", _NORM_EPS[name])
    assert eps is not None
    for key in ("elementwise_affine", "elementwise_gain"):
        section.must_be(key, True, "a norm without gain is not supported")
    for key in ("bias", "elementwise_bias"):
        if section.take(key, True) is False and kind == "layer":
            kind = "layer_no_bias"
    section.close("dtype", "device")
    return kind, eps


def _check_bias(tensors: Shapes, name: str, kind: NormKind, said: str) -> None:
    tensors.sizes(f"{name}.weight", 1)
    there = f"{name}.bias" in tensors
    if there != (kind == "layer"):
        raise ValueError(f"{said} is {kind}, but there is {'a' if there else 'no'} tensor {name}.bias")


def _heads(section: Section, tensors: Shapes, width: int, name: str) -> tuple[int, dict[str, Any]]:
    """Width of heads, and the norms of their queries and keys."""
    norm, q_norm = section.part("qk_norm"), f"{name}.q_norm.weight"
    found = tensors.sizes(q_norm, 1)[0] if tensors.same_in(q_norm, f"{name}.k_norm.weight") else None
    if (found is None) != (norm is None):
        said = "is missing" if norm is None else "is given"
        raise ValueError(f"{section.path}.qk_norm {said}, but there is {'a' if found else 'no'} tensor {q_norm}")
    heads = section.whole("num_heads", width // found if found else None)
    if heads is None:
        raise ValueError(f"{section.path}.num_heads is missing, and tensors do not show it")
    if width % heads or found not in (None, width // heads):
        shown = f" and {q_norm} has {found} entries" if found else ""
        raise ValueError(f"{section.path}.num_heads={heads} does not fit: the width is {width}{shown}")
    section.must_be("dim", width, "this is the width of token embeddings")
    section.must_be("head_dim", width // heads, f"the width is {width} and there are {heads} heads")
    if norm is None:
        return width // heads, {}
    kind, eps = _norm(norm)
    _check_bias(tensors, f"{name}.q_norm", kind, norm.path)
    return width // heads, {"qk_norm_kind": kind, "qk_norm_eps": eps}


def _as_ours(facts: dict[str, Any]) -> dict[str, Any]:
    """Set facts to null that equal the meaning of null in our configuration."""
    for key, same in (("qk_norm_kind", "norm"), ("qk_norm_eps", "norm_eps"), ("text_hidden_width", "width")):
        if facts.get(key) == facts[same]:
            facts[key] = None
    return facts


def _self_attention(section: Section, tensors: Shapes, width: int, part: str) -> dict[str, Any]:
    attention, name = section.name(*_SELF_ATTENTION), f"{BLOCKS}0.{part}"
    section.must_be("is_causal", True, "a prior sees no later tokens", silent=False)
    for key in ("rope", "rope_pos_embed"):
        section.refuse(key, "rotary positions are not supported")
    head_dim, norms = _heads(section, tensors, width, name)
    for key in ("num_kv_heads", "num_key_value_heads"):
        section.must_be(key, width // head_dim, "keys and values shared by several heads are not supported")
    fused = f"{name}.qkv.weight" in tensors
    rows = 3 * width if fused else width
    for matrix in ("qkv",) if fused else ("q_proj", "k_proj", "v_proj"):
        found, _ = tensors.sizes(f"{name}.{matrix}.weight", 2)
        if found != rows:
            raise ValueError(
                f"tensor {name}.{matrix}.weight has {found} rows instead of {rows}: keys and values shared by several "
                "heads, and heads of another width, are not supported"
            )
    bias = f"{name}.{'qkv' if fused else 'q_proj'}.bias" in tensors
    section.must_be("qkv_bias", bias, "tensors show it")
    section.must_be("sdpa", True, "attention is the usual one")
    if attention == "GenericAttention":  # its dropout also acts in evaluation
        section.must_be("attn_drop", 0.0, "it would drop weights in evaluation")
    scale = section.number("qk_scale")
    section.close("attn_drop", "proj_drop", "use_bias", "use_flex_attention", "num_patches")
    return {
        "head_dim": head_dim,
        "qk_norm": bool(norms),
        "qkv_bias": bias,
        "qk_scale": scale if attention in _SCALED else None,
        **norms,
    }


def _cross_attention(section: Section, tensors: Shapes, width: int, facts: Mapping[str, Any]) -> dict[str, Any]:
    section.name(*_CROSS_ATTENTION)
    name = f"{BLOCKS}0.cross_attn"
    head_dim, norms = _heads(section, tensors, width, name)
    if head_dim != facts["head_dim"]:
        raise ValueError(
            f"{section.path}.num_heads={width // head_dim} differs from the {width // facts['head_dim']} heads of "
            "self-attention; this model has one number for both"
        )
    different = norms and facts["qk_norm"] and any(facts[key] != value for key, value in norms.items())
    if different:
        raise ValueError(f"{section.path}.qk_norm={norms} differs from self-attention's; this model has one for both")
    section.must_be("encoder_dim", width, "the text's projection is as wide as the blocks")
    section.refuse("is_causal", "a position sees the whole text")
    section.refuse("relative_pos_embed", "positions of the text are not supported")
    bias = tensors.same_in(f"{name}.Wq.bias", f"{name}.Wk.bias", f"{name}.Wv.bias")
    section.must_be("qkv_bias", bias, "tensors show it")
    if bias != facts["qkv_bias"]:
        raise ValueError(f"{section.path}.qkv_bias={bias} differs from self-attention's; this model has one for both")
    return {"cross_qk_norm": bool(norms), **norms}  # the class accepts and ignores further options


def _mlp(trunk: Section, tensors: Shapes, width: int, passed: Section | None) -> dict[str, Any]:
    """`passed` is the activation that blocks pass to an MLP, which may set its own."""
    section = trunk.part("ffn_target") or Section(f"{trunk.path}.ffn_target", {"_target_": "MLP"})
    name = section.name("MLP", *_GATED)
    hidden, _ = tensors.sizes(f"{BLOCKS}0.mlp.fc1.weight", 2)
    gated = name in _GATED
    if gated != (f"{BLOCKS}0.mlp.fc3.weight" in tensors):
        there = "no" if gated else "a"
        raise ValueError(f"{section.path}._target_={name}, but there is {there} tensor {BLOCKS}0.mlp.fc3.weight")
    ratio = trunk.number("mlp_ratio", 4.0)
    assert ratio is not None
    wanted = trunk.whole("mlp_hidden_dim", int(ratio * width))
    assert wanted is not None
    if gated:
        multiple = section.whole("multiple_of", 256)
        assert multiple is not None
        wanted = -(-int(2 * wanted / 3) // multiple) * multiple
    if hidden != wanted:
        raise ValueError(
            f"{trunk.path}.mlp_ratio and mlp_hidden_dim with {section.path} make a hidden width of {wanted}, but "
            f"{BLOCKS}0.mlp.fc1.weight has {hidden} rows"
        )
    section.refuse("norm_layer", "a norm in the MLP is not supported")
    if not gated:  # gated classes accept and ignore further options
        section.close("act_layer", "drop", "use_bias", "in_features", "hidden_features", "out_features")
    activation = _GATED.get(name) or _activation(passed) or "gelu"
    ours = PriorConfig(width=width, head_dim=width, mlp_ratio=ratio, gated=gated).hidden_width
    sizes = {"mlp_ratio": ratio, "mlp_hidden_width": None if hidden == ours else hidden}
    return {"gated": gated, "activation": activation, **sizes}


def _activation(section: Section | None) -> Activation | None:
    """The activation that a section names; None without one."""
    if section is None:
        return None
    name = section.name("GELU", "SiLU")
    kind = section.take("approximate", "none")
    if kind not in ("none", "tanh"):
        raise ValueError(f"{section.path}.approximate={kind} must be none or tanh")
    section.close("inplace")
    if name == "SiLU":
        return "silu"
    return "gelu_tanh" if kind == "tanh" else "gelu"


def _text(encoder: Section, trunk: Section, tensors: Shapes, width: int, folder: Path) -> dict[str, Any]:
    """The projection of text states, and the positions that the prior sees."""
    encoder.name("T5EmbedderWithMLP")
    embedder, mlp = encoder.required("t5_embedder"), encoder.required("mlp")
    encoder.close()
    embedder.name("T5Embedder")
    hidden, text_width = tensors.sizes(f"{TEXT_MLP}fc1.weight", 2)
    tensors.sizes(f"{TEXT_MLP}fc2.weight", 2)
    name = mlp.name("TextToEmbedMLP", "MLP")
    for key in ("text_dim", "in_features"):
        mlp.must_be(key, text_width, f"{TEXT_MLP}fc1.weight shows it")
    for key in ("embed_dim", "out_features"):
        mlp.must_be(key, width, "the text's projection is as wide as the blocks")
    mlp.must_be("hidden_features", hidden, f"{TEXT_MLP}fc1.weight shows it")
    bias = tensors.same_in(f"{TEXT_MLP}fc1.bias", f"{TEXT_MLP}fc2.bias")
    mlp.must_be("use_bias", bias, "tensors show it")
    mlp.refuse("norm_layer", "a norm in the text's projection is not supported")
    activation = _activation(mlp.part("act_layer"))
    if activation is None and name == "TextToEmbedMLP":
        raise ValueError(f"{mlp.path}.act_layer is missing, and {name} cannot be built without it")
    mlp.close("drop")
    cross, masks, key = trunk.take("cross_attn_target"), "self_attn_mask_read_key", "text_embeddings_mask_write_key"
    read, written = trunk.take(masks), embedder.take(key)
    if read not in (None, written):
        raise ValueError(f"{trunk.path}.{masks}={read} differs from {embedder.path}.{key}={written}")
    self_attention = str(trunk.take("self_attn_target")["_target_"]).rsplit(".", 1)[-1]
    if read is not None and self_attention in _TAKES_MASK:
        raise ValueError(f"{trunk.path}.{masks}={read}, but {self_attention} cannot take the mask of a text")
    trunk.must_be("encoder_output_key", embedder.take("text_embeddings_write_key"), "the trunk attends to the text")
    masked = read is not None and str(cross["_target_"]).endswith("WithMask")
    length = embedder.whole("encoder_seqlen_max")
    if not masked and length is None:
        raise ValueError(
            f"{trunk.path}.{masks}={read} with {embedder.path}.encoder_seqlen_max=None: padding would be seen, and its "
            "length would depend on the other texts of a batch"
        )
    encoder_name = embedder.take("hf_hub_path", "google/flan-t5-xl")
    embedder.close("read_key", "decoder_seqlen", "cond_dropout_p")
    return {
        "text_width": text_width,
        "text_hidden_width": hidden,
        "text_activation": activation or "gelu",
        "text_bias": bias,
        "text_length": length or LONGEST_TEXT,
        "text_mask": masked,
        "null_text_length": 1 if masked or length is None else length,
        "text_encoder": _place(encoder_name, folder),
    }


def _head(section: Section, tensors: Shapes, vocabulary: int, width: int) -> dict[str, Any]:
    section.name("LinearClassifier")
    section.must_be("in_features", width, "this is the width of token embeddings")
    section.must_be("out_features", vocabulary, "this is the number of token embeddings")
    facts = {"head_bias": f"{HEAD}linear.bias" in tensors, "head_norm": f"{HEAD}norm.weight" in tensors}
    section.must_be("use_bias", facts["head_bias"], "tensors show it")
    section.must_be("use_layernorm", facts["head_norm"], "tensors show it")
    section.refuse("use_batchnorm", "the published class cannot build it")
    section.close("read_key", "write_key", "weight_init_style", "init_std", "encoder_num_blocks")
    return facts


def _generation(values: Any, kind: str) -> GenerationConfig:
    section = Section("generation", {} if values is None else values)
    section.must_be("model_type", MODEL_TYPES[kind], f"tensors show a {kind} condition")
    top_k, top_p = section.take("top_k", 0), section.take("top_p", 0.0)
    if type(top_k) is not int or type(top_p) not in (int, float):
        raise ValueError(f"generation.top_k={top_k} and generation.top_p={top_p} must be numbers")
    greedy = section.take("sample") is False
    scale = section.take("cfg_factor")
    if scale is not None and (type(scale) not in (int, float) or not abs(scale) < 1e9):
        raise ValueError(f"generation.cfg_factor={scale} must be a number or null")
    norm_guidance = section.take("tokenizer_perform_norm_guidance")
    if type(norm_guidance) not in (bool, type(None)):
        raise ValueError(f"generation.tokenizer_perform_norm_guidance={norm_guidance} must be true or false")
    return GenerationConfig(
        cfg_scale=None if scale is None and not section.has("cfg_factor") else float(1.0 if scale is None else scale),
        temperature=0.0 if greedy else section.number("temperature"),
        top_k=top_k if top_k > 0 else None,
        top_p=float(top_p) if top_p > 0 else None,
        guidance=None if norm_guidance is None else "apg" if norm_guidance else "cfg",
        guidance_scale=section.number("tokenizer_cfg_factor"),
        num_steps=section.whole("timesteps"),
    )


def _place(name: Any, folder: Path) -> str:
    """A name of weights, as a path if they are in the folder of the release."""
    if type(name) is not str or not name:
        raise ValueError(f"the configuration names weights {name!r}, which is not a text")
    inside = folder / name
    return str(inside) if inside.exists() else name


def _notes(values: Any) -> dict[str, Any]:
    """The notes on a prior that the published configuration has no place for."""
    notes = values if isinstance(values, dict) else {}
    names = notes.get("class_names", [])
    texts = {key: notes[key] for key in NOTES if key in notes}
    if not isinstance(names, list) or any(type(text) is not str for text in [*names, *texts.values()]):
        raise ValueError(f"flextok_pl={notes} must hold texts, and class_names as a list of them")
    return {**texts, "class_names": tuple(names)}
