"""Finite scalar quantisation (https://arxiv.org/abs/2309.15505, section 3 and appendix A).

It learns no codebook and has no loss. Each dimension of a code is bounded and rounded to one of a few levels; these
digits form the token.

Shapes: D code dimensions, one per entry of `levels`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flextok_pl.models.arguments import as_ids
from flextok_pl.precision import at_least_float32


class FSQ(nn.Module):
    """Rounds every dimension of a bounded code to its number of levels, as in the paper.

    The official FlexTok code truncates when it forms an index. We round, so that every index survives a round trip
    with any levels.
    """

    _levels: Tensor
    _basis: Tensor

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)
        # Buffers, because numbers on the host would make it wait for a GPU. They hold values even on the meta device.
        device = "cpu" if torch.get_default_device().type == "meta" else None
        each = torch.tensor(self.levels, device=device)  # (D,)
        self.register_buffer("_levels", each, persistent=False)
        self.register_buffer("_basis", each.cumprod(0) // each, persistent=False)  # 1, L0, L0*L1, ...

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return math.prod(self.levels)

    def bound(self, codes: Tensor) -> Tensor:
        """Squash (..., D) codes into the range of their levels; rounding the result gives the level.

        The margin of 1e-3 reaches no further level of 1000 or fewer.
        """
        half = (self._levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(self._levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (at_least_float32(codes) + shift).tanh() * half - offset

    def forward(self, codes: Tensor) -> Tensor:
        """Quantise with straight-through gradients: (..., D) -> (..., D) in [-1, 1], at least float32."""
        bounded = self.bound(codes)
        rounded = bounded + (bounded.round() - bounded).detach()
        return rounded / (self._levels // 2)

    def codes_to_tokens(self, quantized: Tensor) -> Tensor:
        """Quantised (..., D) codes -> (...) int64 tokens; dimension 0 varies fastest."""
        half = self._levels // 2
        digits = (quantized.float() * half).round().long() + half
        return (digits * self._basis).sum(-1)

    def tokens_to_codes(self, tokens: Tensor) -> Tensor:
        """(...) tokens of any integer type -> (..., D) float32 quantised codes in [-1, 1]."""
        tokens = as_ids(tokens)
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise ValueError(
                f"tokens span {int(tokens.min())}..{int(tokens.max())} but this tokenizer's vocabulary is "
                f"0..{self.vocab_size - 1}; were they made by a tokenizer with other fsq_levels, or read as a "
                "smaller type than they were stored in?"
            )
        half = self._levels // 2
        digits = tokens[..., None] // self._basis % self._levels  # (..., D)
        return (digits - half) / half
