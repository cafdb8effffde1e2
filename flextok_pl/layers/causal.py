"""Causal self-attention with a cache of keys and values, cross-attention over text, and the block of the prior.

By default this is Llama's block (https://arxiv.org/abs/2302.13971) without rotary positions, as in LlamaGen
(https://arxiv.org/abs/2406.06525): RMSNorm before attention and SwiGLU, no biases. Options of `PriorConfig` give the
blocks of l3m (https://github.com/apple/ml-l3m), which published priors use.

Shapes: B batch, L new positions, P positions in the cache, T text positions, H heads, D width, d head width.
"""

from collections.abc import Callable, Mapping
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flextok_pl.config import Activation, PriorConfig
from flextok_pl.layers.few_rows import Linear
from flextok_pl.layers.norm import make_norm

ACTIVATIONS: Mapping[Activation, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
}


class Window(NamedTuple):
    """The filled positions of caches, as tensors, so that steps of one position keep their shapes."""

    place: Tensor  # (1,) int64, the position of the step
    bias: Tensor  # (1, length), added to the logits of attention: 0 for filled positions, -inf for others

    @classmethod
    def over(cls, cache: "KeyValueCache", place: Tensor) -> "Window":
        """The window of caches like this one that are filled up to `place`."""
        bias = torch.full((1, cache.length), float("-inf"), dtype=cache.keys.dtype, device=place.device)
        bias[:, : cache.filled] = 0.0
        return cls(place, bias)

    def open(self) -> None:
        """Make the position of the step visible."""
        self.bias.index_fill_(1, self.place, 0.0)


class KeyValueCache:
    """Keys and values of one layer; allocates memory for `length` positions when the first ones come.

    Steps see the filled part, whose shape grows, or all of it through a `window`, which all layers share.
    """

    keys: Tensor  # (B, H, length, d)
    values: Tensor  # (B, H, length, d)

    def __init__(self, length: int) -> None:
        self.length, self.filled = length, 0
        self.window: Window | None = None

    def append(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Add (B, H, L, d) keys and values; returns views of those to attend to, and the bias of their logits."""
        if self.filled == 0:
            # Zeros, because through a window values of weight 0 are summed too.
            self.keys, self.values = (
                new.new_zeros(*new.shape[:2], self.length, new.shape[3]) for new in (keys, values)
            )
        if self.window is not None:
            self.keys.index_copy_(2, self.window.place, keys)
            self.values.index_copy_(2, self.window.place, values)
            return self.keys, self.values, self.window.bias
        stop = self.filled + keys.shape[2]
        self.keys[:, :, self.filled : stop] = keys
        self.values[:, :, self.filled : stop] = values
        self.filled = stop
        return self.keys[:, :, :stop], self.values[:, :, :stop], None

    def select(self, rows: Tensor, length: int) -> "KeyValueCache":
        """Copy some rows (N,) int64 of this cache into a new one for `length` positions."""
        cache = KeyValueCache(length)
        cache.append(*(part[:, :, : self.filled].index_select(0, rows) for part in (self.keys, self.values)))
        return cache


class CausalAttention(nn.Module):
    """Self-attention in which a position sees itself and earlier ones.

    `qk_norm` normalises the queries and keys of each head (https://arxiv.org/abs/2302.05442).
    """

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.head_dim, self.scale = config.head_dim, config.qk_scale
        self.wqkv = Linear(config.width, 3 * config.width, bias=config.qkv_bias)
        self.proj = Linear(config.width, config.width, bias=config.bias)
        self.q_norm, self.k_norm = (_head_norm(config, config.qk_norm) for _ in range(2))

    def forward(self, x: Tensor, cache: KeyValueCache | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D); L must be 1 if the cache already holds positions."""
        q, k, v = rearrange(self.wqkv(x), "b l (n h d) -> n b h l d", n=3, d=self.head_dim)
        q, k = self.q_norm(q).to(v.dtype), self.k_norm(k).to(v.dtype)
        bias = None
        if cache is not None:
            assert cache.filled == 0 or x.shape[1] == 1
            k, v, bias = cache.append(k, v)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=x.shape[1] > 1, scale=self.scale)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))  # type: ignore[no-any-return]


class TextMemory(NamedTuple):
    """Keys and values of a text for one layer's queries."""

    keys: Tensor  # (B, H, T, d)
    values: Tensor  # (B, H, T, d)
    mask: Tensor  # (B, T) bool, True for text, False for padding

    def select(self, rows: Tensor) -> "TextMemory":
        """The memory of some rows (N,) int64 of this one."""
        return TextMemory(*(part.index_select(0, rows) for part in self))


class CrossAttention(nn.Module):
    """Attention over text states."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.wq = Linear(config.width, config.width, bias=config.qkv_bias)
        self.wkv = Linear(config.width, 2 * config.width, bias=config.qkv_bias)
        self.proj = Linear(config.width, config.width, bias=config.bias)
        self.q_norm, self.k_norm = (_head_norm(config, config.cross_qk_norm) for _ in range(2))

    def memory(self, text: Tensor, mask: Tensor) -> TextMemory:
        """Keys and values of (B, T, D) text, which do not depend on the queries."""
        k, v = rearrange(self.wkv(text), "b t (n h d) -> n b h t d", n=2, d=self.head_dim)
        return TextMemory(self.k_norm(k).to(v.dtype), v, mask)

    def forward(self, x: Tensor, memory: TextMemory) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        q = rearrange(self.wq(x), "b l (h d) -> b h l d", d=self.head_dim)
        q = self.q_norm(q).to(memory.keys.dtype)
        visible = memory.mask[:, None, None, :].expand(-1, 1, x.shape[1], -1)
        out = F.scaled_dot_product_attention(q, memory.keys, memory.values, attn_mask=visible)
        return self.proj(rearrange(out, "b h l d -> b l (h d)"))  # type: ignore[no-any-return]


class Activated(nn.Module):
    """One of `ACTIVATIONS`."""

    def __init__(self, name: Activation) -> None:
        super().__init__()
        self.function = ACTIVATIONS[name]

    def forward(self, x: Tensor) -> Tensor:
        """(...) -> (...)."""
        return self.function(x)


def _head_norm(config: PriorConfig, wanted: bool) -> nn.Module:
    """The norm of queries or keys, per head."""
    if not wanted:
        return nn.Identity()
    return make_norm(config.qk_norm_kind or config.norm, config.head_dim, config.qk_norm_eps or config.norm_eps)


class CausalMLP(nn.Module):
    """fc2(a(fc1 x) * fc3 x), with SiLU as `a` SwiGLU (https://arxiv.org/abs/2002.05202), or plain fc2(a(fc1 x))."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        width, hidden = config.width, config.hidden_width
        self.activation = Activated(config.activation)
        self.fc1 = Linear(width, hidden, bias=config.bias)
        self.fc2 = Linear(hidden, width, bias=config.bias)
        self.fc3 = Linear(width, hidden, bias=config.bias) if config.gated else None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        hidden = self.activation(self.fc1(x))
        return self.fc2(hidden if self.fc3 is None else hidden * self.fc3(x))  # type: ignore[no-any-return]


class CausalBlock(nn.Module):
    """Pre-norm block: self-attention, cross-attention in a prior of texts, then the MLP."""

    def __init__(self, config: PriorConfig) -> None:
        super().__init__()
        text = config.text_width is not None
        norm = partial(make_norm, config.norm, config.width, config.norm_eps)
        self.attn_norm = norm()
        self.attn = CausalAttention(config)
        self.cross_norm = norm() if text else None
        self.cross = CrossAttention(config) if text else None
        self.mlp_norm = norm()
        self.mlp = CausalMLP(config)

    def text_memory(self, text: Tensor, mask: Tensor) -> TextMemory:
        """Keys and values of (B, T, D) text with a (B, T) mask, for the block's queries."""
        assert self.cross is not None, "this block was made without text"
        return self.cross.memory(text, mask)

    def forward(self, x: Tensor, memory: TextMemory | None = None, cache: KeyValueCache | None = None) -> Tensor:
        """(B, L, D) -> (B, L, D)."""
        x = x + self.attn(self.attn_norm(x), cache)
        if memory is not None:
            assert self.cross is not None and self.cross_norm is not None
            x = x + self.cross(self.cross_norm(x), memory)
        return x + self.mlp(self.mlp_norm(x))  # type: ignore[no-any-return]
