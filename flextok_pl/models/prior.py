"""The prior: a GPT-style Transformer over FlexTok tokens, conditioned on a class or on a text.

Settings follow the class-conditional and text-conditional models of FlexTok (https://arxiv.org/abs/2502.13967): learned
absolute positions, pre-norm, SwiGLU, width 64 * depth. A class embedding is added to the start token; blocks attend to
a text. Options of `PriorConfig` give the variants of the models published as FlexAR
(https://github.com/EPFL-VILAB/search-over-tokens), which `Prior.from_pretrained` reads.

Shapes: B batch, K tokens, m prefix, D width, V vocabulary, T text positions, E text width, R rows (2B under guidance).
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.config import PriorConfig
from flextok_pl.contracts import PositionScale, check_sampling
from flextok_pl.interop import PRIOR_FORMATS
from flextok_pl.layers.blocks import run_block
from flextok_pl.layers.causal import Activated, CausalBlock, KeyValueCache, TextMemory
from flextok_pl.layers.embeddings import sincos_position_table
from flextok_pl.layers.few_rows import Linear
from flextok_pl.layers.norm import make_norm
from flextok_pl.models.arguments import as_ids, check_budget
from flextok_pl.models.cuda_graph import can_capture
from flextok_pl.models.generation import GenerationState, begin_generation, uniform_numbers
from flextok_pl.models.pretrained import PretrainedModel
from flextok_pl.models.sampling import Sampling, scale_at_positions
from flextok_pl.precision import full_precision


class TextStates(NamedTuple):
    """A text encoder's states of texts."""

    states: Tensor  # (B, T, E), padded
    mask: Tensor  # (B, T) bool, True for states, False for padding


Condition = Tensor | tuple[Tensor, Tensor] | None
"""(B,) int64 classes, -1 for no class; or `TextStates`; or None for no condition."""


class Prior(PretrainedModel):
    """Predicts each token from those before it and from the condition.

    Position 0 is the start token, and position i > 0 holds token i-1. The output at position i predicts token i.

    `null_class` chooses the null condition of guidance of a class prior: a learned embedding, or none. A text prior
    uses the text encoder's states of the empty string, which `set_null_text` stores; until then a published prior has
    NaN there.

    In a folder or Hub repository its file is `prior.safetensors`; a release has `model.safetensors` and `config.yaml`.
    """

    config: PriorConfig
    null_text: Tensor
    formats = PRIOR_FORMATS

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.activation_checkpointing = False
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.start = nn.Parameter(torch.empty(width))
        self.positions = nn.Parameter(torch.empty(config.num_tokens, width), requires_grad=not config.fixed_positions)
        if config.text_width is None:
            learned = config.null_class == "learned"  # the last embedding
            self.class_embedding = nn.Embedding(config.num_classes + learned, width)
        else:
            hidden = config.text_hidden_width or width
            self.text_projection = nn.Sequential(
                nn.Linear(config.text_width, hidden, bias=config.text_bias),
                Activated(config.text_activation),
                nn.Linear(hidden, width, bias=config.text_bias),
            )
            self.register_buffer("null_text", torch.zeros(config.null_text_length, config.text_width))
        self.blocks = nn.ModuleList(CausalBlock(config) for _ in range(config.depth))
        self.norm = make_norm(config.norm, width, config.norm_eps) if config.final_norm else nn.Identity()
        self.head_norm = nn.LayerNorm(width, eps=1e-5) if config.head_norm else nn.Identity()
        self.head = Linear(width, config.vocab_size, bias=config.head_bias)
        self._init_weights()

    def _init_weights(self) -> None:
        """Normal of standard deviation 0.02, and smaller for what adds to the residual stream, as in GPT-2."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif "norm" not in name:
                adds = name.endswith(("proj.weight", "fc2.weight"))
                nn.init.normal_(parameter, std=0.02 / (2 * self.config.depth) ** 0.5 if adds else 0.02)
        if self.config.fixed_positions:
            table = sincos_position_table(self.config.width, (self.num_tokens, 1))[0, :, :, 0].T  # (K, D)
            self.positions.data.copy_(F.pad(table, (0, 0, 1, -1)))  # the start token has none

    def trained_on(self, tokenizer: str, class_names: Sequence[str]) -> None:
        """Record in the configuration the hash of the tokenizer whose tokens it learns, and the class names."""
        self.config = dataclasses.replace(self.config, tokenizer=tokenizer, class_names=tuple(class_names))

    def checkpoint_activations(self, enabled: bool = True) -> None:
        """Recompute blocks in the backward pass instead of keeping activations, to save memory."""
        self.activation_checkpointing = enabled

    @property
    def num_tokens(self) -> int:
        """K, the most tokens of a sample."""
        return self.config.num_tokens

    @property
    def device(self) -> torch.device:
        """The device of the weights."""
        return self.start.device

    def set_null_text(self, states: Tensor) -> None:
        """Store the text encoder's states of the empty string, (T, E), as the null condition.

        `TextEncoder.null_states()` gives them. The files of published priors do not hold them.
        """
        wanted = (self.config.null_text_length, self.config.text_width)
        if tuple(states.shape) != wanted:
            raise ValueError(
                f"the empty string has states {tuple(states.shape)}, but the prior takes {wanted}: set "
                "null_text_length and text_width to those of the text encoder"
            )
        self.null_text.copy_(states)

    @property
    def knows_null(self) -> bool:
        """Whether the model has a null condition. A published text prior has none until `set_null_text`."""
        return self.config.text_width is None or bool(self.null_text.isfinite().all())

    def forward(self, tokens: Tensor, condition: Condition = None) -> Tensor:
        """Logits under teacher forcing, with gradients: (B, k) int64 tokens, k <= K, and a `Condition` -> (B, k, V).

        Position i predicts token i from those before it.

        Raises:
            ValueError: tokens or condition do not fit the model.
        """
        tokens = self._checked_tokens(tokens, "tokens", 1)
        condition = self._checked_condition(condition, len(tokens))
        return self.head(self.hidden(tokens, condition))  # type: ignore[no-any-return]

    def hidden(self, tokens: Tensor, condition: Condition = None, null: Tensor | None = None) -> Tensor:
        """Compute the states (B, k, D) that the head turns into logits; unchecked, for training.

        Takes the arguments of `forward`, and `null` (B,) bool: the samples whose condition is dropped.
        """
        null = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device) if null is None else null
        memories = self._memories(condition, null)
        return self.run(self._embed(tokens[:, :-1], condition, null), memories)

    def begin(
        self,
        condition: Condition = None,
        prefix: Tensor | None = None,
        cfg_scale: PositionScale = 1.0,
        num_tokens: int | None = None,
    ) -> GenerationState:
        """Make the state from which to draw tokens one by one or in branches; takes the arguments of `generate`.

        `prefix` must have fewer than `num_tokens` tokens.

        Raises:
            ValueError: an argument does not fit the model.
        """
        length = self.num_tokens if num_tokens is None else num_tokens
        condition, prefix = self._checked_start(condition, prefix, _batch_size(condition, prefix, None), length)
        if prefix.shape[1] == length:
            raise ValueError(f"prefix has all num_tokens={length} tokens: there is nothing to draw")
        scales = scale_at_positions(cfg_scale, self.num_tokens)
        return self._begin(condition, prefix, scales, any(scale != 1.0 for scale in scales), length)

    @torch.no_grad()
    def generate(
        self,
        condition: Condition = None,
        num_tokens: int | None = None,
        cfg_scale: PositionScale = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        prefix: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Sample tokens, with a cache of keys and values.

        The logits are those of `forward`: unconditional + scale * (conditional - unconditional), computed as one batch.
        Each sample's generator first draws K numbers, which decide its tokens. With one generator for each sample, the
        tokens depend neither on the batch nor on `num_tokens`.

        Args:
            condition: (B,) classes, -1 for no class; or text states and mask; or None for no condition, with as many
                samples as `prefix` or `generator` has, or else one.
            num_tokens: k, number of tokens to return, prefix included; default K.
            cfg_scale: guidance, 1 for none: a number, numbers to interpolate over the K positions, or a function of the
                position.
            temperature: divides the logits; 0 takes the most likely token.
            top_k: draw from the k most likely tokens.
            top_p: draw from the fewest most likely tokens that together have this probability.
            prefix: (B, m) int64 first tokens to keep, m <= k.
            generator: one for the batch, or one for each sample.

        Returns:
            (B, k) int64.

        Raises:
            ValueError: an argument does not fit the model.
        """
        length = self.num_tokens if num_tokens is None else num_tokens
        check_sampling(temperature, top_k, top_p)
        scales = scale_at_positions(cfg_scale, self.num_tokens)
        batch = _batch_size(condition, prefix, generator)
        condition, prefix = self._checked_start(condition, prefix, batch, length)
        if prefix.shape[1] == length or batch == 0:
            return prefix.new_zeros(0, length) if batch == 0 else prefix
        uniform = uniform_numbers(generator, batch, self.num_tokens, self.device)
        guided = any(scale != 1.0 for scale in scales[prefix.shape[1] : length])
        state = self._begin(condition, prefix, scales, guided, length)
        state.extend(length - prefix.shape[1], uniform, Sampling(temperature, top_k, top_p))
        return state.tokens

    @torch.no_grad()
    def _begin(
        self, condition: Condition, prefix: Tensor, scales: Sequence[float], guided: bool, length: int
    ) -> GenerationState:
        """Run (B, m) first tokens under the condition and, for guidance, without it."""
        null, tokens = torch.zeros(len(prefix), dtype=torch.bool, device=self.device), prefix
        if guided:
            self._require_null()
            condition, null, tokens = _doubled(condition), torch.cat([null, ~null]), prefix.repeat(2, 1)
        graph_device = self.device if can_capture(self) else None
        with full_precision(self.device):
            x, memories = self._embed(tokens, condition, null), self._memories(condition, null)
            return begin_generation(self, prefix, x, memories, scales, length, graph_device)

    def _checked_start(
        self, condition: Condition, prefix: Tensor | None, batch: int, length: int
    ) -> tuple[Condition, Tensor]:
        """Check the condition and the (B, m) first tokens of B sequences of `length` tokens."""
        check_budget(length, self.num_tokens)
        if prefix is None:
            prefix = torch.zeros(batch, 0, dtype=torch.int64, device=self.device)
        prefix = self._checked_tokens(prefix, "prefix", 0)
        if prefix.shape[1] > length or len(prefix) != batch:
            raise ValueError(
                f"prefix has shape {tuple(prefix.shape)}, but you asked for {batch} samples of num_tokens={length}"
            )
        return self._checked_condition(condition, batch), prefix

    def embed_next(self, tokens: Tensor, place: Tensor) -> Tensor:
        """The input of the blocks for one more position: (R, 1) tokens and the position (1,) -> (R, 1, D)."""
        return self.token_embedding(tokens) + self.positions.index_select(0, place)  # type: ignore[no-any-return]

    def logits(self, states: Tensor) -> Tensor:
        """Apply the head to a few states: (R, D) -> (R, V) float32."""
        return self.head(states).float()  # type: ignore[no-any-return]

    def _embed(self, tokens: Tensor, condition: Condition, null: Tensor) -> Tensor:
        """The input of the blocks: start token and (B, m) tokens -> (B, m+1, D)."""
        start = self.start.expand(len(tokens), -1)
        if self.config.text_width is None:
            empty = null.new_full((len(tokens),), -1, dtype=torch.int64)
            classes = condition if isinstance(condition, Tensor) else empty
            null = null | (classes < 0)
            if self.config.null_class == "learned":
                start = start + self.class_embedding(classes.masked_fill(null, self.config.num_classes))
            else:
                start = start + self.class_embedding(classes.clamp(min=0)).masked_fill(null[:, None], 0)
        x = torch.cat([start[:, None], self.token_embedding(tokens)], dim=1)
        return x + self.positions[: x.shape[1]]

    def _memories(self, condition: Condition, null: Tensor) -> list[TextMemory | None]:
        """Keys and values of the text for every block; the null text's where `null` (B,) is True."""
        if self.config.text_width is None:
            return [None] * len(self.blocks)
        empty, length = self.null_text, len(self.null_text)
        if condition is None:
            states, mask = empty.expand(len(null), -1, -1), null.new_ones(len(null), length)
        else:
            states, mask = _text(condition)
            longest = max(length, states.shape[1])
            states = F.pad(states.to(empty), (0, 0, 0, longest - states.shape[1]))  # (B, T, E)
            mask = F.pad(mask, (0, longest - mask.shape[1]))  # (B, T)
            states = torch.where(null[:, None, None], F.pad(empty, (0, 0, 0, longest - length)), states)
            mask = torch.where(null[:, None], torch.arange(longest, device=null.device) < length, mask)
        if not self.config.text_mask:
            mask = torch.ones_like(mask)
        text = self.text_projection(states)  # (B, T, D)
        return [cast(CausalBlock, block).text_memory(text, mask) for block in self.blocks]

    def run(self, x: Tensor, memories: list[TextMemory | None], caches: list[KeyValueCache] | None = None) -> Tensor:
        """All blocks and the last norm: (R, L, D) -> (R, L, D)."""
        for i, (block, memory) in enumerate(zip(self.blocks, memories, strict=True)):
            cache = None if caches is None else caches[i]
            x = run_block(block, self.activation_checkpointing and cache is None, x, memory, cache)
        return self.head_norm(self.norm(x))  # type: ignore[no-any-return]

    def _checked_tokens(self, tokens: Tensor, name: str, least: int) -> Tensor:
        config = self.config
        tokens = as_ids(tokens, name)
        if tokens.ndim != 2 or not least <= tokens.shape[1] <= config.num_tokens:
            raise ValueError(
                f"{name} is {tokens.dtype} {tuple(tokens.shape)}; this prior takes int64 (B, k) with k in "
                f"{least}..{config.num_tokens}"
            )
        if tokens.numel() and not 0 <= int(tokens.min()) <= int(tokens.max()) < config.vocab_size:
            raise ValueError(
                f"{name} holds {int(tokens.min())}..{int(tokens.max())}, outside 0..{config.vocab_size - 1}: another "
                "tokenizer than the prior's made it"
            )
        return tokens.to(self.device)

    def _require_null(self) -> None:
        if not self.knows_null:
            raise ValueError(
                "sampling without a condition and guidance need the states of the empty string, which files of "
                "published priors lack: prior.set_null_text(TextEncoder(prior.config.text_encoder, "
                "prior.config.text_length, pad=not prior.config.text_mask).null_states())"
            )

    def _checked_condition(self, condition: Condition, batch: int) -> Condition:
        if condition is None:
            self._require_null()
            return None
        config = self.config
        if config.text_width is not None:
            states, mask = _text(condition)
            if states.ndim != 3 or states.shape[::2] != (batch, config.text_width) or mask.shape != states.shape[:2]:
                raise ValueError(
                    f"text states {tuple(states.shape)} with mask {tuple(mask.shape)}: this prior takes ({batch}, T, "
                    f"{config.text_width}) with ({batch}, T); use the prior's own text encoder"
                )
            if not config.text_mask and states.shape[1] != config.text_length:
                raise ValueError(
                    f"text states of {states.shape[1]} positions: this prior sees padding, so all texts must have "
                    f"text_length={config.text_length} positions; make them with TextEncoder(..., pad=True)"
                )
            if not mask.any(1).all():
                raise ValueError("a text has no states; for no condition pass condition=None")
            return TextStates(states.to(self.device), mask.to(self.device))
        expected = f"must be int64 classes of shape ({batch},), -1 for no class"
        if isinstance(condition, tuple):
            raise ValueError(f"condition {expected}: this prior takes no texts")
        classes = as_ids(condition, f"condition, which {expected},")
        if classes.shape != (batch,):
            raise ValueError(f"condition {expected}; it has shape {tuple(classes.shape)}")
        if batch and not -1 <= int(classes.min()) <= int(classes.max()) < config.num_classes:
            raise ValueError(
                f"condition holds classes {int(classes.min())}..{int(classes.max())}; this prior has "
                f"0..{config.num_classes - 1}, and -1 for no class"
            )
        return classes.to(self.device)


def _text(condition: Condition) -> tuple[Tensor, Tensor]:
    """States and mask; without a mask all states count."""
    if isinstance(condition, Tensor):
        return condition, torch.ones(condition.shape[:2], dtype=torch.bool, device=condition.device)
    assert condition is not None
    return condition[0], condition[1].bool()


def _doubled(condition: Condition) -> Condition:
    """The condition of 2B rows; the second half becomes null."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return torch.cat([condition, condition])
    return torch.cat([condition[0]] * 2), torch.cat([condition[1]] * 2)


def _batch_size(
    condition: Condition, prefix: Tensor | None, generator: torch.Generator | Sequence[torch.Generator] | None
) -> int:
    if condition is not None:
        return len(condition if isinstance(condition, Tensor) else condition[0])
    if prefix is not None:
        return len(prefix)
    return len(generator) if isinstance(generator, Sequence) else 1
