"""From logits to a token, with the randomness as an argument; and guidance scales over positions.

Shapes: B batch, K positions, V vocabulary.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.contracts import PositionScale
from flextok_pl.precision import accumulation_dtype

BLOCK = 256  # tokens whose probabilities are summed up at once
BELOW_ONE = {torch.float64: 1 - 2**-40, torch.float32: 1 - 2**-20}  # by type of sums: a factor that survives rounding


def scale_at_positions(scale: PositionScale, num_tokens: int) -> list[float]:
    """The guidance scale of each of K positions; 1 is no guidance."""
    if callable(scale):
        scales = [float(scale(position)) for position in range(num_tokens)]
    elif not isinstance(scale, Sequence):
        scales = [float(scale)] * num_tokens
    elif not scale:
        raise ValueError("cfg_scale=[] has no numbers; give one number, or some to interpolate between")
    else:
        scales = [_interpolated(scale, position / max(1, num_tokens - 1)) for position in range(num_tokens)]
    wrong = [value for value in scales if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"cfg_scale holds {wrong[0]}; give finite numbers, 1 being no guidance")
    return scales


def _interpolated(values: Sequence[float], share: float) -> float:
    """The value at a share of the way from the first to the last."""
    place = share * (len(values) - 1)
    left = min(int(place), max(0, len(values) - 2))
    right = min(left + 1, len(values) - 1)
    return float(values[left] + (values[right] - values[left]) * (place - left))


def sample_tokens(
    logits: Tensor, uniform: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Draw one token per sample by inverting its cumulative distribution: (B, V) and (B,) in [0, 1) -> (B,) int64.

    A sample's token depends on its own logits and number only; it is one of the vocabulary even where logits are NaN.
    `temperature` 0 takes the most likely token. Then `top_k` keeps the k most likely tokens, and `top_p` of these the
    fewest whose probabilities sum up to p (https://arxiv.org/abs/1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1, dtype=accumulation_dtype(logits.device))
        dropped = before.cumsum(-1) - before >= top_p  # the likeliest token is never dropped
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return _invert_cumulative((logits - logits.amax(-1, keepdim=True)).exp(), uniform)


def _invert_cumulative(weights: Tensor, uniform: Tensor) -> Tensor:
    """Where the running sum of (B, V) weights passes `uniform` (B,) of its total: (B,) int64.

    First the block of the vocabulary, then the place in it: sums of blocks cost far less than V wide partial sums.
    """
    wide = accumulation_dtype(weights.device)
    below_one = BELOW_ONE[wide]
    blocks = F.pad(weights, (0, -weights.shape[1] % BLOCK)).reshape(len(weights), -1, BLOCK)  # (B, N, BLOCK)
    cumulative = blocks.sum(-1, dtype=wide).cumsum(-1)  # (B, N)
    # Below the total in spite of rounding, so that a weight of zero at the end cannot be drawn.
    wanted = uniform.to(wide).to(weights.device)[:, None] * cumulative[:, -1:] * below_one
    block = torch.searchsorted(cumulative, wanted, right=True).clamp(max=blocks.shape[1] - 1)  # (B, 1)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    within = blocks.take_along_dim(block[..., None], 1)[:, 0].cumsum(-1, dtype=wide)  # (B, BLOCK)
    place = torch.searchsorted(within, torch.minimum(wanted - before, within[:, -1:] * below_one), right=True)
    return (block * BLOCK + place)[:, 0].clamp(max=weights.shape[1] - 1)  # beyond only where weights are NaN
