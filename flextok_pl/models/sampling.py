"""Draw tokens from logits, with the randomness as an argument; set guidance scales over positions.

Shapes: B batch, K positions, V vocabulary, N draws from one distribution.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flextok_pl.contracts import PositionScale
from flextok_pl.precision import accumulation_dtype

BLOCK = 256  # tokens whose probabilities are summed at once
BELOW_ONE = {torch.float64: 1 - 2**-40, torch.float32: 1 - 2**-20}  # a factor below 1 that survives rounding, by type


def scale_at_positions(scale: PositionScale, num_tokens: int) -> list[float]:
    """The guidance scale of each of K positions; 1 turns guidance off."""
    if callable(scale):
        scales = [float(scale(position)) for position in range(num_tokens)]
    elif not isinstance(scale, Sequence):
        scales = [float(scale)] * num_tokens
    elif not scale:
        raise ValueError("cfg_scale=[] is empty; give one number, or some to interpolate between")
    else:
        scales = [_interpolated(scale, position / max(1, num_tokens - 1)) for position in range(num_tokens)]
    wrong = [value for value in scales if not math.isfinite(value)]
    if wrong:
        raise ValueError(f"cfg_scale holds {wrong[0]}; give finite numbers, 1 being no guidance")
    return scales


def _interpolated(values: Sequence[float], share: float) -> float:
    """Interpolate between values, at a share of the way from the first to the last."""
    place = share * (len(values) - 1)
    left = min(int(place), max(0, len(values) - 2))
    right = min(left + 1, len(values) - 1)
    return float(values[left] + (values[right] - values[left]) * (place - left))


class Sampling(NamedTuple):
    """Options for drawing a token from logits; see `filter_logits`."""

    temperature: float = 1.0  # 0 takes the most likely token
    top_k: int | None = None
    top_p: float | None = None


GREEDY = Sampling(temperature=0)


def filter_logits(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Logits of the distribution to draw tokens from: (B, V) -> (B, V) float32, -inf for excluded tokens.

    `temperature` divides them. Then `top_k` keeps the k most likely tokens, and `top_p` the fewest of these whose
    probabilities sum up to p (https://arxiv.org/abs/1904.09751). Temperature 0 leaves the logits unchanged.
    """
    if temperature == 0:
        return logits.float()
    logits = logits.float() if temperature == 1 else logits.float() / temperature
    if top_k is not None and top_k < logits.shape[-1]:
        logits = logits.masked_fill(logits < logits.topk(top_k).values[:, -1:], float("-inf"))
    if top_p is not None and top_p < 1:
        ordered, order = logits.sort(descending=True, stable=True)
        before = ordered.softmax(-1, dtype=accumulation_dtype(logits.device))
        dropped = before.cumsum(-1) - before >= top_p  # the likeliest token is never dropped
        logits = logits.masked_fill(torch.zeros_like(dropped).scatter(-1, order, dropped), float("-inf"))
    return logits


def token_log_probs(filtered: Tensor, tokens: Tensor) -> Tensor:
    """Log-probabilities of tokens under the result of `filter_logits`: (B, V) and (B, N) -> (B, N)."""
    shifted = filtered - filtered.amax(-1, keepdim=True)
    total = shifted.exp().sum(-1, keepdim=True, dtype=accumulation_dtype(filtered.device))
    return shifted.gather(1, tokens).to(total.dtype) - total.log()


def draw_tokens(filtered: Tensor, uniform: Tensor) -> Tensor:
    """Draw tokens by inverting the cumulative distributions: (B, V) logits and (B, N) in [0, 1) -> (B, N) int64.

    A token depends on its own logits and number only, and is in the vocabulary even where logits are NaN.
    """
    blocks = _blocks(filtered)
    return _invert_cumulative(blocks, _sums(blocks), uniform).clamp(max=filtered.shape[1] - 1)  # NaN reaches beyond


def draw_distinct(filtered: Tensor, uniform: Tensor) -> Tensor:
    """Draw without replacement, one after the other: (B, V) logits and (B, N) in [0, 1) -> (B, N) int64.

    The first tokens are those of `draw_tokens`. When no token with a probability is left, all may be drawn again.
    """
    all_blocks = _blocks(filtered)
    all_sums, enough = _sums(all_blocks), bool(((all_blocks > 0).flatten(1).sum(1) >= uniform.shape[1]).all())
    blocks, sums, drawn = all_blocks.clone(), all_sums.clone(), []
    for numbers in uniform[..., None].unbind(1):  # (B, 1)
        if not enough and not (left := sums.any(1, keepdim=True)).all():
            sums, blocks = torch.where(left, sums, all_sums), torch.where(left[..., None], blocks, all_blocks)
        token = _invert_cumulative(blocks, sums, numbers)  # (B, 1)
        drawn.append(token)
        blocks.flatten(1).scatter_(1, token, 0.0)
        block = token // BLOCK
        sums.scatter_(1, block, _sums(blocks.take_along_dim(block[..., None], 1)))
    return torch.cat(drawn, dim=1)


def _blocks(filtered: Tensor) -> Tensor:
    """Probabilities up to a factor, in blocks of the vocabulary: (B, V) logits -> (B, M, BLOCK)."""
    weights = (filtered - filtered.amax(-1, keepdim=True)).exp()
    return F.pad(weights, (0, -weights.shape[1] % BLOCK)).reshape(len(weights), -1, BLOCK)


def _sums(blocks: Tensor) -> Tensor:
    return blocks.sum(-1, dtype=accumulation_dtype(blocks.device))


def _invert_cumulative(blocks: Tensor, sums: Tensor, uniform: Tensor) -> Tensor:
    """Find where the running sums of weights pass `uniform` (B, N) of their totals: (B, N) int64.

    It finds the block of the vocabulary first, then the place in it: sums of blocks cost far less than V partial sums.
    """
    wide = sums.dtype
    below_one = BELOW_ONE[wide]
    cumulative = sums.cumsum(-1)  # (B, M)
    # Stay below the total despite rounding, so that a weight of zero at the end is never drawn.
    wanted = uniform.to(wide).to(sums.device) * cumulative[:, -1:] * below_one  # (B, N)
    block = torch.searchsorted(cumulative, wanted, right=True).clamp(max=sums.shape[1] - 1)  # (B, N)
    before = F.pad(cumulative, (1, 0)).gather(1, block)
    within = blocks.take_along_dim(block[..., None], 1).cumsum(-1, dtype=wide)  # (B, N, BLOCK)
    left = torch.minimum(wanted - before, within[..., -1] * below_one)  # (B, N)
    place = torch.searchsorted(within, left[..., None], right=True)[..., 0]
    return block * BLOCK + place
