"""From logits to a token, with the randomness as an argument; and guidance scales over positions.

Shapes: B batch, K positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.contracts import PositionScale

BLOCK = 256
"""Tokens whose probabilities are summed up at once."""

BELOW_ONE = 1 - 2**-40
"""Rounding of float64 sums is far smaller."""


def scale_at_positions(scale: PositionScale, num_tokens: int) -> list[float]:
    """The guidance scale of each position.

    Args:
        scale: constant, numbers to interpolate, or function; 1 is no guidance.
        num_tokens: K, of the whole sequence.

    Raises:
        ValueError: an empty sequence.
    """
    if callable(scale):
        return [float(scale(position)) for position in range(num_tokens)]
    if not isinstance(scale, Sequence):
        return [float(scale)] * num_tokens
    if not scale:
        raise ValueError("cfg_scale=[] has no numbers; give one number, or some to interpolate between")
    scales = []
    for position in range(num_tokens):
        place = position / max(1, num_tokens - 1) * (len(scale) - 1)
        left = min(int(place), max(0, len(scale) - 2))
        right = min(left + 1, len(scale) - 1)
        scales.append(float(scale[left] + (scale[right] - scale[left]) * (place - left)))
    return scales


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw one token per sample by inverting its cumulative distribution, in the order of the vocabulary.

    A sample's token depends on its own logits and number only. `top_k` is applied before `top_p`, both after the
    temperature.

    Args:
        logits: (B, V).
        uniform: (B,) float64 in [0, 1).
        temperature: divides the logits; 0 takes the most likely token.
        top_k: keep the k most likely tokens.
        top_p: keep the fewest most likely tokens whose probabilities sum up to p (https://arxiv.org/abs/1904.09751).

    Returns:
        (B,) int64.
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1, dtype=torch.float64)
        dropped = before.cumsum(-1) - before >= top_p  # the likeliest token is never dropped
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return _invert_cumulative((logits - logits.amax(-1, keepdim=True)).exp(), uniform.to(logits.device))


def _invert_cumulative(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of (B, V) weights passes `uniform` (B,) of its total: (B,) int64.

    First the block of the vocabulary, then the place in it: sums of blocks cost far less than V float64 partial sums.
    """
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).reshape(len(weights), -1, BLOCK)  # (B, N, BLOCK)
    cumulative = blocks.sum(-1, dtype=torch.float64).cumsum(-1)  # (B, N)
    # Below the total in spite of rounding, so that a weight of zero at the end cannot be drawn.
    wanted = uniform[:, None] * cumulative[:, -1:] * BELOW_ONE
    block = torch.searchsorted(cumulative, wanted, right=True)  # (B, 1)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    within = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1, dtype=torch.float64)  # (B, BLOCK)
    place = torch.searchsorted(within, torch.minimum(wanted - before, within[:, -1:] * BELOW_ONE), right=True)
    return (block * BLOCK + place)[:, 0]
