"""Finite scalar quantisation (https://arxiv.org/abs/2309.15505, section 3 and appendix A).

What is special about it: there is no codebook to learn and no loss of its own. Each dimension of a code is bounded and
rounded to one of a few levels, and the token is the number that these digits spell.

Shapes: D code dimensions, one per entry of `levels`.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flextok_pl.models.arguments import as_ids


class FSQ(nn.Module):
    """Rounds every dimension of a bounded code to its number of levels.

    As in the paper. The official FlexTok code truncates when it forms an index; we round, so that every index survives
    a round trip whatever the levels.
    """

    def __init__(self, levels: Sequence[int]) -> None:
        super().__init__()
        self.levels = tuple(levels)

    @property
    def vocab_size(self) -> int:
        """Number of distinct tokens."""
        return math.prod(self.levels)

    def _levels_and_basis(self, device: torch.device) -> tuple[Tensor, Tensor]:
        levels = torch.tensor(self.levels, device=device)  # (D,)
        basis = levels.cumprod(0) // levels  # 1, L0, L0*L1, ...
        return levels, basis

    def bound(self, codes: Tensor) -> Tensor:
        """Squash (..., D) codes into the range of their levels; rounding the result gives the level."""
        levels, _ = self._levels_and_basis(codes.device)
        half = (levels - 1) * (1 + 1e-3) / 2
        offset = torch.where(levels % 2 == 0, 0.5, 0.0)
        shift = (offset / half).atanh()
        return (codes.float() + shift).tanh() * half - offset

    def forward(self, codes: Tensor) -> Tensor:
        """Quantise with straight-through gradients: (..., D) -> (..., D) float32 in [-1, 1]."""
        bounded = self.bound(codes)
        rounded = bounded + (bounded.round() - bounded).detach()
        levels, _ = self._levels_and_basis(codes.device)
        return rounded / (levels // 2)

    def codes_to_tokens(self, quantized: Tensor) -> Tensor:
        """Quantised (..., D) codes -> (...) int64 tokens; dimension 0 varies fastest."""
        levels, basis = self._levels_and_basis(quantized.device)
        half = levels // 2
        digits = (quantized.float() * half).round().long() + half
        return (digits * basis).sum(-1)

    def tokens_to_codes(self, tokens: Tensor) -> Tensor:
        """(...) tokens of any integer type -> (..., D) float32 quantised codes in [-1, 1]."""
        tokens = as_ids(tokens)
        if tokens.numel() and (tokens.min() < 0 or tokens.max() >= self.vocab_size):
            raise ValueError(
                f"tokens span {int(tokens.min())}..{int(tokens.max())} but this tokenizer's vocabulary is "
                f"0..{self.vocab_size - 1}; were they made by a tokenizer with other fsq_levels, or read as a "
                "smaller type than they were stored in?"
            )
        levels, basis = self._levels_and_basis(tokens.device)
        half = levels // 2
        digits = tokens[..., None] // basis % levels  # (..., D)
        return (digits - half) / half
