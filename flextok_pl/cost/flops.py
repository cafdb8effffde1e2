"""Floating-point operations of a training step, from the models' configurations.

Matrix products and attention count, a multiplication with its addition as two; norms, activations and embeddings do
not, as is the custom for MFU (PaLM, https://arxiv.org/abs/2204.02311, appendix B). Attention counts all pairs of query
and key that the code hands to the kernel, also where a causal kernel skips half of them.

Shapes: B batch, N patches, K registers, k <= K computed registers, D width, H hidden width, V vocabulary, T text
positions, E text width.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import prod
from typing import NamedTuple

import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.flow.nested_dropout import budget_probabilities
from flextok_pl.layers.blocks import swiglu_width


@dataclass(frozen=True)
class Flops:
    """Operations of a part of a model.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        recomputed: of the forward passes that activation checkpointing repeats.
    """

    forward: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    def __add__(self, other: Flops) -> Flops:
        return Flops(self.forward + other.forward, self.backward + other.backward, self.recomputed + other.recomputed)

    def __mul__(self, factor: float) -> Flops:
        return Flops(self.forward * factor, self.backward * factor, self.recomputed * factor)

    @property
    def training(self) -> float:
        """Of a training step, as MFU counts them: without what is recomputed."""
        return self.forward + self.backward


class BudgetGroup(NamedTuple):
    """A part of a batch that is sorted by budget.

    Attributes:
        size: images in it.
        longest: (K+1,) probability of each number of registers that the part computes.
    """

    size: int
    longest: Tensor


def budget_groups(config: FlexTokConfig, batch_size: int, groups: int) -> list[BudgetGroup]:
    """How many registers each part of a sorted batch computes; see `flow_loss`.

    The largest budget of the first r images in order is at most k where at least r of the B budgets are: a binomial
    tail in the law's distribution function at k.

    Args:
        config: names the laws of budget and null condition.
        batch_size: B.
        groups: parts of the batch.
    """
    law = budget_probabilities(config.nested_dropout, config.num_registers) * (1 - config.null_dropout)
    law[0] += config.null_dropout
    below = law.cumsum(0).clamp(max=1.0)[:, None]  # (K+1, 1), P(budget <= k)
    counts = torch.arange(batch_size + 1, dtype=torch.float64)  # (B+1,)
    choose = torch.lgamma(counts[-1] + 1) - torch.lgamma(counts + 1) - torch.lgamma(counts[-1] - counts + 1)
    successes = (choose + torch.xlogy(counts, below) + torch.xlogy(counts[-1] - counts, 1 - below)).exp()
    at_least = successes.flip(1).cumsum(1).flip(1)  # (K+1, B+1), P(r or more budgets <= k)
    parts = []
    for rows in torch.arange(1, batch_size + 1).chunk(groups):
        cumulative = at_least[:, rows[-1]].clone()
        cumulative[0] = 0.0  # at least one register is computed
        longest = cumulative.diff(prepend=cumulative.new_zeros(1))
        parts.append(BudgetGroup(len(rows), longest))
    return parts


@lru_cache(maxsize=64)
def tokenizer_flops(config: FlexTokConfig, batch_size: int = 1, groups: int = 1, patches: int | None = None) -> Flops:
    """Encoder and decoder per image, expected over the budgets of training.

    Args:
        config: the model.
        batch_size: B, images of a batch on one device.
        groups: `budget_groups` of the training.
        patches: N; default those of the position table.
    """
    n = prod(config.grid_size) if patches is None else patches
    by_budget = [encoder_flops(config, k, n) + decoder_flops(config, k, n) for k in range(config.num_registers + 1)]
    total = Flops()
    for group in budget_groups(config, batch_size, groups):
        for probability, flops in zip(group.longest.tolist(), by_budget, strict=True):
            total += flops * (probability * group.size / batch_size)
    return total


def encoder_registers(config: FlexTokConfig, kept: int) -> int:
    """Positions beside the patches that the encoder computes for `kept` codes."""
    if config.layout == "grid":
        return 0
    return kept if config.causal_registers else config.num_registers


def decoder_registers(config: FlexTokConfig, kept: int) -> int:
    """Positions beside the patches that the decoder computes for `kept` tokens: one more for all that are dropped."""
    return 0 if config.layout == "grid" else min(kept + 1, config.num_registers)


def modulated_kinds(config: FlexTokConfig) -> int:
    """Kinds of positions that the decoder modulates apart."""
    return 1 if config.layout == "grid" else 2


def encoder_flops(config: FlexTokConfig, kept: int, patches: int) -> Flops:
    """The encoder on one image, for `kept` codes."""
    width, length = config.encoder_width, patches + encoder_registers(config, kept)
    hidden = swiglu_width(width, config.mlp_ratio)
    patch_values = config.latent_channels * config.patch_size**2

    def block(rows: int, scores: int) -> Flops:
        inner = _attention(rows, length, scores, width) + _mlp(rows, width, hidden)
        # Checkpointing stops where all that the backward pass needs is there again: before the last product.
        return inner + Flops(recomputed=inner.forward - _matmul(rows, hidden, width).forward)

    return (
        _matmul(patches, patch_values, width, input_gradient=False)
        + block(length, length**2) * (config.encoder_depth - 1)
        + block(kept, kept * length)
        + _matmul(kept, width, len(config.fsq_levels))
    )


def decoder_flops(config: FlexTokConfig, kept: int, patches: int) -> Flops:
    """The flow decoder on one image, for `kept` tokens."""
    width, length = config.decoder_width, patches + decoder_registers(config, kept)
    hidden = swiglu_width(width, config.mlp_ratio)
    patch_values = config.latent_channels * config.patch_size**2

    def block(rows: int) -> Flops:
        inner = _matmul(1, width, modulated_kinds(config) * 6 * width) + _attention(rows, length, rows * length, width)
        inner += _mlp(rows, width, hidden)
        return inner + Flops(recomputed=inner.forward)

    return (
        _matmul(patches, patch_values, width, input_gradient=False)
        + _matmul(decoder_registers(config, kept) or kept, len(config.fsq_levels), width)
        + _matmul(1, config.time_frequencies, width, input_gradient=False)
        + _matmul(1, width, width)
        + block(length) * (config.decoder_depth - 1)
        + block(patches)
        + _matmul(1, width, 2 * width)
        + _matmul(patches, width, patch_values)
    )


def projection_flops(width: int, hidden: int, features: int, patches: int) -> Flops:
    """REPA's projection of one image's patches: decoder width, hidden width, width of the teacher's features."""
    return _matmul(patches, width, hidden) + _matmul(patches, hidden, hidden) + _matmul(patches, hidden, features)


@lru_cache(maxsize=64)
def prior_flops(config: PriorConfig, text_length: int = 0) -> Flops:
    """A prior on one sequence of tokens.

    Args:
        config: the model.
        text_length: T, positions of the text that it attends to.
    """
    width, length = config.width, config.num_tokens
    hidden = swiglu_width(width, config.mlp_ratio)
    block = _attention(length, length, length**2, width) + _mlp(length, width, hidden)
    outside = _matmul(length, width, config.vocab_size)
    if config.text_width is not None:
        block += _matmul(length, width, 2 * width) + _scores(length * text_length, width)
        outside += _matmul(text_length, width, 2 * width) * config.depth  # keys and values of the text, per block
        outside += _matmul(text_length, config.text_width, width, input_gradient=False)
        outside += _matmul(text_length, width, width)
    # As in the encoder, the last product of a block is not repeated.
    block += Flops(recomputed=block.forward - _matmul(length, hidden, width).forward)
    return block * config.depth + outside


def _matmul(rows: int, inputs: int, outputs: int, input_gradient: bool = True) -> Flops:
    """(rows, inputs) @ (inputs, outputs); without `input_gradient` only the weight gets a gradient."""
    forward = 2.0 * rows * inputs * outputs
    return Flops(forward, forward * (2 if input_gradient else 1))


def _scores(pairs: int, width: int) -> Flops:
    """Queries times keys and weights times values, for pairs of query and key."""
    return Flops(4.0 * pairs * width, 8.0 * pairs * width)


def _attention(queries: int, keys: int, pairs: int, width: int) -> Flops:
    """Projections of `queries` rows to queries and outputs, of `keys` rows to keys and values, and the scores."""
    return _matmul(2 * queries, width, width) + _matmul(2 * keys, width, width) + _scores(pairs, width)


def _mlp(rows: int, width: int, hidden: int) -> Flops:
    """SwiGLU."""
    return _matmul(3 * rows, width, hidden)
