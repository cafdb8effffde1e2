"""Hyper-parameters of the prior; see `flextok_pl.config`."""

from __future__ import annotations

from dataclasses import dataclass

from flextok_pl.config.checks import as_tuples, at_least, preset_of


@dataclass(frozen=True)
class PriorConfig:
    """An autoregressive prior over the tokens of a FlexTok tokenizer.

    It has one kind of condition: a class (`num_classes`), a text (`text_width`), or none.

    Args:
        num_classes: number of classes; 0 for a prior without classes.
        text_width: E, width of the text encoder's states; None for a prior without text.
        vocab_size: V, number of distinct tokens; that of the tokenizer.
        num_tokens: K, length of a sequence; the tokenizer's `num_registers`.
        depth: number of blocks.
        width: D; 64 * depth in the presets.
        head_dim: width of an attention head.
        mlp_ratio: SwiGLU hidden width is int(2 * int(mlp_ratio * D) / 3).
        qk_norm: normalise queries and keys, which keeps large models stable.
        null_text_length: positions of the empty string's states: 1 for T5, 2 for MiniLM.
        tokenizer: hash of the weights of the tokenizer whose tokens it knows; empty where unknown.
        text_encoder: name of the text encoder whose states it knows; empty where unknown.
        class_names: names of the classes, or empty.
        started_from: source and hash of the weights that its training started from; empty for new ones.
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
    text_encoder: str = ""
    class_names: tuple[str, ...] = ()
    started_from: str = ""

    def __post_init__(self) -> None:
        as_tuples(self, "class_names")
        at_least(self, num_classes=0, vocab_size=2, num_tokens=1, depth=1, head_dim=1, null_text_length=1)
        if self.width < 1 or self.width % self.head_dim:
            raise ValueError(f"width={self.width} must be a multiple of head_dim={self.head_dim}")
        if self.text_width is not None and self.text_width < 1:
            raise ValueError(f"text_width={self.text_width} must be at least 1, or null for a prior without text")
        if self.text_width is not None and self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} and text_width={self.text_width}: a prior has one kind of condition; "
                "set num_classes=0 or text_width=null"
            )
        if self.class_names and len(self.class_names) != self.num_classes:
            raise ValueError(f"class_names has {len(self.class_names)} entries for num_classes={self.num_classes}")

    @staticmethod
    def preset(name: str) -> PriorConfig:
        """A configuration by its number of parameters in blocks, at width 64 * depth.

        `49m`, `85m`, `201m`, `393m`, `679m`, `1.33b` are for ImageNet's 1,000 classes; `113m_text`, `382m_text`,
        `1.15b_text`, `3.06b_text` for the states of FLAN-T5-XL. All for 256 tokens of 64,000.
        """
        return preset_of(PRIOR_PRESETS, name)


_CLASS_DEPTHS = {"49m": 10, "85m": 12, "201m": 16, "393m": 20, "679m": 24, "1.33b": 30}
_TEXT_DEPTHS = {"113m_text": 12, "382m_text": 18, "1.15b_text": 26, "3.06b_text": 36}
PRIOR_PRESETS = {
    **{n: PriorConfig(num_classes=1000, depth=d, width=64 * d) for n, d in _CLASS_DEPTHS.items()},
    **{n: PriorConfig(text_width=2048, depth=d, width=64 * d) for n, d in _TEXT_DEPTHS.items()},
}
