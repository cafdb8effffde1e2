"""Hyper-parameters of the prior; see `flextok_pl.config`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flextok_pl.config.checks import as_tuples, at_least, one_of, preset_of

NormKind = Literal["rms", "layer", "layer_no_bias"]
Activation = Literal["silu", "gelu", "gelu_tanh"]
NullClass = Literal["learned", "zero"]


@dataclass(frozen=True)
class GenerationConfig:
    """Generation settings that a prior was published with; null leaves an option to the command's default.

    Args:
        cfg_scale: guidance of the prior, 1 for none.
        temperature: divides the prior's logits; 0 takes the most likely token.
        top_k: draw from the k most likely tokens.
        top_p: draw from the fewest most likely tokens that together have this probability.
        guidance: guidance of the decoder, `cfg` or `apg`.
        guidance_scale: strength of the decoder's guidance.
        num_steps: steps of the decoder.
    """

    cfg_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    guidance: Literal["cfg", "apg"] | None = None
    guidance_scale: float | None = None
    num_steps: int | None = None

    def or_given(self, defaults: Mapping[str, Any], **given: Any) -> dict[str, Any]:
        """Choose each option: the given value, or else this one, or else the default."""
        ranked = {name: (given[name], getattr(self, name), default) for name, default in defaults.items()}
        return {name: next((each for each in values if each is not None), None) for name, values in ranked.items()}


@dataclass(frozen=True)
class PriorConfig:
    """An autoregressive prior over the tokens of a FlexTok tokenizer.

    It has one kind of condition: a class (`num_classes`), a text (`text_width`), or none.

    Args:
        num_classes: number of classes; 0 for a prior without classes.
        text_width: E, width of the text encoder's states; null for a prior without text.
        vocab_size: V, number of distinct tokens; the tokenizer's.
        num_tokens: K, length of a sequence; the tokenizer's `num_registers`.
        depth: number of blocks.
        width: D; 64 * depth in the presets.
        head_dim: width of an attention head.
        mlp_ratio: hidden width of the MLP is h = int(mlp_ratio * D), or int(2 * h / 3) if it is gated.
        qk_norm: normalise queries and keys of self-attention, which keeps large models stable.
        null_text_length: positions of the empty string's states: 1 for T5, 2 for MiniLM.
        tokenizer: hash of the weights of the prior's tokenizer; empty if unknown.
        tokenizer_id: file, folder or Hub id of that tokenizer; empty if unknown.
        text_encoder: name of the prior's text encoder; empty if unknown.
        class_names: names of the classes, or empty.
        started_from: source and hash of the weights that its training started from; empty for new ones.
        norm: kind of norms: `rms`; `layer` for LayerNorm with gain and bias; `layer_no_bias` for gain only. This option
            and all below are for published priors; the presets do not set them.
        norm_eps: eps of the norms.
        qk_norm_kind: kind of the norms of queries and keys; null for `norm`.
        qk_norm_eps: their eps; null for `norm_eps`.
        cross_qk_norm: normalise queries and keys of cross-attention too.
        qk_scale: factor of self-attention's logits; null for head_dim ** -0.5.
        qkv_bias: biases of queries, keys and values.
        bias: biases of the attention's output and of the MLP.
        head_bias: bias of the head.
        gated: multiply the MLP's hidden values by a second projection, as in SwiGLU; false for two plain layers.
        activation: activation of the MLP: `silu`, `gelu` or `gelu_tanh`, its approximation by tanh.
        mlp_hidden_width: hidden width of the MLP; overrides `mlp_ratio`.
        fixed_positions: use fixed sines and cosines of the position instead of learned positions.
        final_norm: a norm after the last block.
        head_norm: another norm before the head, a LayerNorm of eps 1e-5.
        null_class: null condition: `learned` is an embedding of its own, `zero` adds nothing.
        text_hidden_width: hidden width of the projection of text states; null for D.
        text_activation: activation of that projection.
        text_bias: biases of that projection.
        text_length: most tokens of a text, special ones included.
        text_mask: hide padding from cross-attention. If false, all texts must be padded to `text_length`.
        generation: default options of `flextok generate` for this prior.
    """

    num_classes: int = 0
    text_width: int | None = None
    vocab_size: int = 64000
    num_tokens: int = 256
    depth: int = 12
    width: int = 768
    head_dim: int = 64
    mlp_ratio: float = 4.0
    qk_norm: bool = False
    null_text_length: int = 1
    tokenizer: str = ""
    tokenizer_id: str = ""
    text_encoder: str = ""
    class_names: tuple[str, ...] = ()
    started_from: str = ""
    norm: NormKind = "rms"
    norm_eps: float = 1e-6
    qk_norm_kind: NormKind | None = None
    qk_norm_eps: float | None = None
    cross_qk_norm: bool = False
    qk_scale: float | None = None
    qkv_bias: bool = False
    bias: bool = False
    head_bias: bool = False
    gated: bool = True
    activation: Activation = "silu"
    mlp_hidden_width: int | None = None
    fixed_positions: bool = False
    final_norm: bool = True
    head_norm: bool = False
    null_class: NullClass = "learned"
    text_hidden_width: int | None = None
    text_activation: Activation = "gelu_tanh"
    text_bias: bool = True
    text_length: int = 128
    text_mask: bool = True
    generation: GenerationConfig = GenerationConfig()

    def __post_init__(self) -> None:
        as_tuples(self, "class_names")
        at_least(self, num_classes=0, vocab_size=2, num_tokens=1, depth=1, head_dim=1, null_text_length=1)
        at_least(self, text_length=1)
        for name in ("text_width", "mlp_hidden_width", "text_hidden_width"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1, or null")
        for name in ("norm_eps", "qk_norm_eps", "qk_scale"):
            if getattr(self, name) is not None and not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        one_of(self, norm=NormKind, activation=Activation, text_activation=Activation, null_class=NullClass)
        if self.qk_norm_kind is not None:
            one_of(self, qk_norm_kind=NormKind)
        if self.width < 1 or self.width % self.head_dim:
            raise ValueError(f"width={self.width} must be a multiple of head_dim={self.head_dim}")
        if self.text_width is not None and self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} and text_width={self.text_width}: a prior has one kind of condition; "
                "set num_classes=0 or text_width=null"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} entries for num_classes={self.num_classes}")
        if self.fixed_positions and self.width % 4:
            raise ValueError(f"fixed_positions=true needs a width that is a multiple of 4, not width={self.width}")
        if self.null_class == "zero" and not self.num_classes:
            raise ValueError("null_class='zero' is for a prior of classes: set num_classes, or null_class='learned'")
        if not self.text_mask and self.null_text_length != self.text_length:
            raise ValueError(
                f"text_mask=false with text_length={self.text_length} and null_text_length={self.null_text_length}: "
                "without a mask the empty string is padded like any text; set both to the same number"
            )

    @property
    def hidden_width(self) -> int:
        """Hidden width of the MLP."""
        if self.mlp_hidden_width is not None:
            return self.mlp_hidden_width
        plain = int(self.mlp_ratio * self.width)
        return int(2 * plain / 3) if self.gated else plain

    @staticmethod
    def preset(name: str) -> PriorConfig:
        """A named configuration, by its number of parameters in blocks, at width 64 * depth.

        `49m`, `85m`, `201m`, `393m`, `679m`, `1.33b` are for ImageNet's 1,000 classes; `113m_text`, `382m_text`,
        `1.15b_text`, `3.06b_text` for the states of FLAN-T5-XL. All have 256 tokens of a vocabulary of 64,000.
        """
        return preset_of(PRIOR_PRESETS, name)


_CLASS_DEPTHS = {"49m": 10, "85m": 12, "201m": 16, "393m": 20, "679m": 24, "1.33b": 30}
_TEXT_DEPTHS = {"113m_text": 12, "382m_text": 18, "1.15b_text": 26, "3.06b_text": 36}
PRIOR_PRESETS = {
    **{n: PriorConfig(num_classes=1000, depth=d, width=64 * d) for n, d in _CLASS_DEPTHS.items()},
    **{n: PriorConfig(text_width=2048, depth=d, width=64 * d) for n, d in _TEXT_DEPTHS.items()},
}
