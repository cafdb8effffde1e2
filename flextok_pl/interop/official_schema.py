"""What an official configuration may say: its modules, in their order, and the options of each.

The official code builds a model by instantiating what its configuration names. Here the names are only compared with
those below (https://github.com/apple/ml-flextok/tree/87d00cc8babf4a25ffce0f3f0c4d8b529d3d6abf, constructors), and every
option is either read, required to have the value that our model implements, or known to have no effect on the function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

REQUIRED = object()
"""Default of an option that must be given."""

_PRECISIONS = (None, "fp32", "float32")


@dataclass(frozen=True)
class Module:
    """One module of an official configuration.

    Args:
        target: the only class it may name.
        reads: option -> (kind, the official default or REQUIRED); see `_KINDS`.
        fixed: option -> (the values our model implements, the official default).
        training: option -> value that changes nothing; another one affects training only, and is warned about.
        inert: further options without effect on the function; the names of what is passed between modules, which end in
            `_key` or `_keys`, have none.
        function: what the option `per_sample_op` must name.
    """

    target: str
    reads: Mapping[str, tuple[str, Any]] = field(default_factory=dict)
    fixed: Mapping[str, tuple[tuple[Any, ...], Any]] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    inert: frozenset[str] = frozenset()
    function: str | None = None

    def read(self, path: str, values: Any, warn: Callable[[str], None]) -> dict[str, Any]:
        """The options to read, checked.

        Args:
            path: where `values` stand in the configuration, for messages.
            values: the module's entry, plain data.
            warn: takes a message about an option that is not reproduced in training.

        Raises:
            ValueError: another class, an unknown option, a wrong type, or a value that our model does not implement.
        """
        check_target(path, values, self.target)
        if self.function is not None:
            check_target(f"{path}.per_sample_op", values.get("per_sample_op"), self.function)
        for key, value in values.items():
            if key == "_target_" or key in self.fixed or key in self.reads or key in self.inert:
                continue
            if key in self.training:
                if value != self.training[key]:
                    warn(f"{path}.{key}={value!r} is not reproduced; it only affects training")
            elif not key.endswith(("_key", "_keys")):
                raise ValueError(f"{path} has an unknown option {key!r}={_short(value)}; the function may depend on it")
        for key, (allowed, default) in self.fixed.items():
            value = values.get(key, default)
            if not any(type(value) is type(one) and value == one for one in allowed):
                given = "missing" if value is REQUIRED else repr(value)
                wanted = " or ".join(map(repr, allowed))
                raise ValueError(f"{path}.{key} is {_short(given)}; this model needs {wanted}")
        return {
            key: _checked(f"{path}.{key}", values.get(key, default), kind)
            for key, (kind, default) in self.reads.items()
        }


def check_target(path: str, values: Any, *targets: str) -> None:
    """Compare what an entry names with what it may name.

    Raises:
        ValueError: it is no mapping, or names something else.
    """
    if not isinstance(values, dict):
        raise ValueError(f"{path} is a {type(values).__name__} instead of a mapping")
    named = values.get("_target_")
    if named not in targets:
        raise ValueError(f"{path} names {_short(named)}; only {' or '.join(targets)} is known there")


def _integer(value: Any) -> bool:
    return type(value) is int and 0 <= value < 2**31


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "size": ("a positive integer", lambda v: _integer(v) and v > 0),
    "sizes": (
        "a list of positive integers",
        lambda v: isinstance(v, list | tuple) and all(_integer(x) and x > 0 for x in v),
    ),
    "even": ("a positive even integer", lambda v: _integer(v) and v > 0 and v % 2 == 0),
    "indices": ("a list of integers", lambda v: v is None or (isinstance(v, list | tuple) and all(map(_integer, v)))),
    "number": ("a number", _number),
    "positive": ("a positive number", lambda v: _number(v) and v > 0),
    "positive?": ("a positive number or null", lambda v: v is None or (_number(v) and v > 0)),
    "probability": ("a probability", lambda v: _number(v) and 0 <= v <= 1),
    "flag": ("true or false", lambda v: type(v) is bool),
    "size?": ("a positive integer or null", lambda v: v is None or (_integer(v) and v > 0)),
    "text": ("a string", lambda v: type(v) is str),
}


def _checked(path: str, value: Any, kind: str) -> Any:
    wanted, fits = _KINDS[kind]
    if value is REQUIRED:
        raise ValueError(f"{path} is missing; it must be {wanted}")
    if not fits(value):
        raise ValueError(f"{path}={_short(value)} must be {wanted}")
    return tuple(value) if isinstance(value, list) else value


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) <= 100 else text[:100] + "..."


_MODEL = "flextok.model"
_PATCHING = Module(
    f"{_MODEL}.preprocessors.patching.PatchEmbedder",
    reads={"dim": ("size", REQUIRED), "channels_in": ("size", REQUIRED), "patch_sizes": ("sizes", REQUIRED)},
    fixed={"flatten_patches": ((False,), True)},
    inert=frozenset({"weight_init_style"}),
)
_POSITIONS = f"{_MODEL}.utils.posembs.PositionalEmbeddingAdder"
_GRID_POSITIONS = Module(
    _POSITIONS,
    reads={"dim": ("size", REQUIRED), "max_sizes": ("sizes", REQUIRED)},
    fixed={"posemb_type": (("sincos",), "sincos"), "posemb_scaling": (("absolute",), "absolute")},
)
_UNPACKER = Module(f"{_MODEL}.postprocessors.seq_unpacking.SequenceUnpacker")
_PACKER = f"{_MODEL}.preprocessors.flex_seq_packing.BlockWiseSequencePacker"
_PACKER_INERT = frozenset({"pad_to_multiple", "max_seq_len", "compile_block_mask", "return_materialized_mask"})
_HEAD_FIXED: dict[str, tuple[tuple[Any, ...], Any]] = {
    "use_mup_readout": ((False,), REQUIRED),
    "proj_bias": ((True,), True),
    "adaLN_bias": ((True,), True),
    "dtype_override": (_PRECISIONS, None),
}


def _channels(direction: str) -> Module:
    operations = f"{_MODEL}.utils.dict_ops"
    return Module(f"{operations}.PerSampleOp", inert=frozenset({"per_sample_op"}), function=f"{operations}.{direction}")


def _transformer(modulated: bool) -> Module:
    """The trunk; the decoder's is modulated by time, separately for patches and registers."""
    return Module(
        f"{_MODEL}.trunks.transformers.FlexTransformer",
        reads={
            "dim": ("size", 768),
            "depth": ("size", 12),
            "head_dim": ("size", 64),
            "mlp_ratio": ("positive", 4.0),
            "intermediate_layers": ("indices", []),
            **({"adaLN_emb_read_key": ("text", REQUIRED)} if modulated else {}),
        },
        fixed={
            "qkv_bias": ((False,), False),
            "proj_bias": ((False,), False),
            "mlp_bias": ((False,), False),
            "gated_mlp": ((True,), True),
            "qk_norm": ((True,), True),
            "score_mod_read_key": ((None,), None),
            "rope_forward_read_key": ((None,), None),
            "adaLN_expansion": ((2,), REQUIRED) if modulated else ((1, 2), 1),
            **({} if modulated else {"adaLN_emb_read_key": ((None,), None)}),
        },
        training={"drop": 0.0, "drop_path_rate": 0.0},
        inert=frozenset({"use_act_checkpoint", "weight_init_style", "zero_init_query_proj"}),
    )


ENCODER: dict[str, Module] = {
    "enc_channels_to_last": _channels("channels_first_to_last"),
    "enc_patch_emb": _PATCHING,
    "enc_posemb_module": _GRID_POSITIONS,
    "enc_register_module": Module(
        f"{_MODEL}.preprocessors.registers.Registers1D",
        reads={
            "dim": ("size", REQUIRED),
            "n_min": ("size", REQUIRED),
            "n_max": ("size", REQUIRED),
            "n_eval": ("size?", None),
        },
        fixed={
            "ordering_mode": (("nested",), "nested"),
            "extra_registers_write_key": ((None,), None),
            "extra_registers_dim": ((None,), None),
        },
        inert=frozenset({"size_sampling_mode"}),  # of no effect where n_min = n_max
    ),
    "enc_seq_packer": Module(
        _PACKER, fixed={"mask_mode": (("causal_last",), "full")}, inert=_PACKER_INERT | {"per_subseq_embs"}
    ),
    "enc_transformer": _transformer(modulated=False),
    "enc_unpacker": _UNPACKER,
    "enc_to_latents": Module(
        f"{_MODEL}.postprocessors.heads.LinearHead",
        reads={"dim": ("size", REQUIRED), "dim_out": ("size", REQUIRED)},
        fixed={**_HEAD_FIXED, "adaLN_emb_read_key": ((None,), None)},
        inert=frozenset({"weight_init_style"}),
    ),
}
"""Modules of the encoder, in their order."""

DECODER: dict[str, Module] = {
    "dec_from_latents": Module(
        f"{_MODEL}.preprocessors.linear.LinearLayer",
        reads={"dim_in": ("size", REQUIRED), "dim": ("size", REQUIRED)},
        fixed={"proj_bias": ((True,), True), "dtype_override": (_PRECISIONS, None)},
        inert=frozenset({"weight_init_style"}),
    ),
    "dec_registers_posemb_module": Module(
        _POSITIONS,
        reads={"dim": ("size", REQUIRED), "max_sizes": ("sizes", REQUIRED)},
        # With a single axis, the sum and the product over axes are the same table.
        fixed={
            "posemb_type": (("learnable_sum", "learnable_prod"), "sincos"),
            "posemb_scaling": (("absolute",), "absolute"),
        },
    ),
    "dec_nested_dropout": Module(
        f"{_MODEL}.preprocessors.token_dropout.MaskedNestedDropout",
        reads={"dim": ("size", REQUIRED), "size_sampling_mode": ("text", "uniform")},
    ),
    "dec_latent_dropout": Module(
        f"{_MODEL}.preprocessors.nullcond.LearnedNullCond",
        reads={"dim": ("size", REQUIRED), "dropout_prob": ("probability", 0.0)},
        fixed={"replace_with_single_token": ((False,), False)},
    ),
    "dec_noise_channels_to_last": _channels("channels_first_to_last"),
    "dec_noise_patch_emb": _PATCHING,
    "dec_patches_posemb_module": _GRID_POSITIONS,
    "dec_seq_packer": Module(
        _PACKER, fixed={"mask_mode": (("full",), "full"), "per_subseq_embs": ((True,), False)}, inert=_PACKER_INERT
    ),
    "dec_time_embedder": Module(
        f"{_MODEL}.preprocessors.time_embedding.TimestepEmbedder",
        reads={
            "dim": ("size", REQUIRED),
            "frequency_embedding_size": ("even", 256),
            "max_timestep": ("positive", 1000.0),
        },
        fixed={"temb_as_tokens": ((False,), False)},
        inert=frozenset({"weight_init_style"}),
    ),
    "dec_transformer": _transformer(modulated=True),
    "dec_unpacker": _UNPACKER,
    "dec_to_patches": Module(
        f"{_MODEL}.postprocessors.heads.ToPatchesLinearHead",
        reads={
            "dim": ("size", REQUIRED),
            "channels_out": ("size", REQUIRED),
            "patch_sizes": ("sizes", REQUIRED),
            "adaLN_emb_read_key": ("text", REQUIRED),
        },
        fixed=_HEAD_FIXED,
        inert=frozenset({"weight_init_style"}),
    ),
    "dec_channels_to_first": _channels("channels_last_to_first"),
}
"""Modules of the decoder, in their order, without those that only feed the alignment with a teacher."""

WRAPPER = f"{_MODEL}.utils.wrappers.SequentialModuleDictWrapper"
REPA_TARGETS = (_UNPACKER.target, f"{_MODEL}.postprocessors.heads.MLPHead", f"{_MODEL}.postprocessors.heads.LinearHead")
"""What a decoder module with `repa` in its name may be: these read patches and change nothing that is decoded."""

VAE = Module(
    "flextok.vae_wrapper.StableDiffusionVAE",
    reads={"latent_channels": ("size", 16), "scaling_factor": ("positive?", None)},
    fixed={"dtype_override": (_PRECISIONS, "fp32"), "learnable_logvar": ((False,), False)},
    inert=frozenset(
        {"hf_hub_path", "sample_posterior", "logvar_init", "compile_encode_fn", "force_vae_encode", "frozen"}
    ),
)
REGULARIZER = Module(
    "flextok.regularizers.quantize_fsq.FSQ",
    reads={"levels": ("sizes", REQUIRED)},
    training={
        "drop_quant_p": 0.0,
        "corrupt_tokens_p": 0.0,
        "min_corrupt_tokens_p": None,
        "apply_corrupt_tokens_p": 0.2,
    },
    inert=frozenset({"packed_call"}),
)
NOISE = Module(
    "flextok.flow_matching.noise_modules.MinRFNoiseModule",
    reads={"ln": ("flag", True), "stratisfied": ("flag", False), "mode_scale": ("number", 0.0)},
)
PIPELINE = Module(
    "flextok.flow_matching.pipelines.MinRFPipeline",
    reads={"out_channels": ("size?", None)},
    inert=frozenset({"_partial_"}),
)
