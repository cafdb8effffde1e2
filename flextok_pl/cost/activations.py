"""Memory of a training step: what autograd keeps for the backward pass, from the models' configurations.

The lists below follow the modules line by line: what a norm, a product or an activation stores of its inputs and
outputs. Under autocast the residual stream and the inputs of norms stay in float32, and each linear map keeps its own
copy of its input in the compute type.

Shapes: B batch, N patches, K registers, k <= K computed registers, L positions, Q query rows, D width, H hidden width.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

import torch

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.cost.flops import budget_groups, decoder_registers, encoder_registers, modulated_kinds
from flextok_pl.layers.blocks import swiglu_width

FULL = 4  # bytes of a float32
RARE = 1e-3  # budgets larger than those planned for happen in this share of the steps


@dataclass(frozen=True)
class Numerics:
    """How numbers are stored in training.

    Attributes:
        compute: bytes of a number that a product takes or gives: 4, or 2 under autocast.
        fused_norms: RMSNorm runs as one kernel, as on a GPU, and does not keep the normalised values.
    """

    compute: int = FULL
    fused_norms: bool = True

    @property
    def autocast(self) -> bool:
        """Whether products run in half precision."""
        return self.compute < FULL


@dataclass(frozen=True)
class Activations:
    """Bytes that a part of a model keeps for the backward pass.

    Attributes:
        kept: without activation checkpointing.
        inputs: with it: the inputs of blocks, and all outside of blocks.
        largest_block: what one block keeps while it is computed again.
    """

    kept: float = 0.0
    inputs: float = 0.0
    largest_block: float = 0.0

    def __add__(self, other: Activations) -> Activations:
        largest = max(self.largest_block, other.largest_block)
        return Activations(self.kept + other.kept, self.inputs + other.inputs, largest)

    def __mul__(self, factor: float) -> Activations:
        """For `factor` images."""
        return Activations(self.kept * factor, self.inputs * factor, self.largest_block * factor)

    def repeated(self, blocks: int) -> Activations:
        """For `blocks` blocks like this one, of which one at a time is computed again."""
        return Activations(self.kept * blocks, self.inputs * blocks, self.largest_block)


def tokenizer_activations(
    config: FlexTokConfig, numerics: Numerics, batch_size: int, groups: int, patches: int | None = None
) -> Activations:
    """Encoder and decoder, for a batch whose budgets are as large as they are in one step of a thousand.

    Args:
        config: the model.
        numerics: how numbers are stored.
        batch_size: B, images on one device.
        groups: `budget_groups` of the training; all parts are kept until the backward pass.
        patches: N; default those of the position table.
    """
    n = prod(config.grid_size) if patches is None else patches
    total = Activations()
    for group in budget_groups(config, batch_size, groups):
        longest = int(torch.searchsorted(group.longest.cumsum(0), 1 - RARE))
        one = encoder_activations(config, numerics, longest, n) + decoder_activations(config, numerics, longest, n)
        total += one * group.size
    return total


def encoder_activations(config: FlexTokConfig, numerics: Numerics, kept: int, patches: int) -> Activations:
    """The encoder on one image; see `encoder_flops`."""
    width, length = config.encoder_width, patches + encoder_registers(config, kept)

    def block(rows: int) -> Activations:
        return _block(width, config.encoder_head_dim, config.mlp_ratio, length, rows, numerics)

    outside = (
        numerics.compute * patches * config.latent_channels * config.patch_size**2
        + (FULL + numerics.compute) * kept * width  # the last norm and the head
        + 8 * FULL * kept * len(config.fsq_levels)  # bounding and rounding
    )
    return block(length).repeated(config.encoder_depth - 1) + block(kept) + Activations(outside, outside)


def decoder_activations(config: FlexTokConfig, numerics: Numerics, kept: int, patches: int) -> Activations:
    """The flow decoder on one image; see `decoder_flops`."""
    width, length, c = config.decoder_width, patches + decoder_registers(config, kept), numerics.compute
    kinds = modulated_kinds(config)

    def block(rows: int) -> Activations:
        plain = _block(width, config.decoder_head_dim, config.mlp_ratio, length, rows, numerics)
        modulated = FULL * width * (length + rows)  # normalised values, which the scales multiply
        gated = c * width * 2 * rows  # outputs of attention and MLP
        time = c * width * (6 * kinds + 1) + FULL * width * 2 * kinds  # activation, six parts of a kind, and 1 + scale
        more = modulated + gated + time
        return Activations(plain.kept + more, plain.inputs, plain.largest_block + more)

    values = config.latent_channels * config.patch_size**2
    outside = (
        c * patches * values
        + (2 * FULL + c) * patches * width  # the head: norm, scale, product
        + c * (kept * len(config.fsq_levels) + config.time_frequencies + 3 * width)
        + 3 * FULL * patches * values  # velocity, target and their difference
    )
    return block(length).repeated(config.decoder_depth - 1) + block(patches) + Activations(outside, outside)


def projection_activations(width: int, hidden: int, features: int, patches: int, numerics: Numerics) -> Activations:
    """REPA's projection and cosine of one image; see `projection_flops`."""
    c = numerics.compute
    kept = patches * (c * (width + 4 * hidden) + 4 * FULL * features)
    return Activations(kept, kept)


def prior_activations(config: PriorConfig, numerics: Numerics, text_length: int = 0) -> Activations:
    """A prior on one sequence, without the loss; see `prior_flops`."""
    width, length, c = config.width, config.num_tokens, numerics.compute
    hidden, norm = swiglu_width(width, config.mlp_ratio), 0 if numerics.fused_norms else FULL
    stream = FULL + norm  # of each norm: its input, and the normalised values
    # Queries, keys, values, output, the input of attention, and that of the MLP: under autocast two copies of it.
    products = 7 if numerics.autocast else 6
    kept = length * width * (2 * stream + c * products) + c * 4 * length * hidden
    outside = float(length * width * stream)
    if config.qk_norm:
        upcast = FULL if numerics.autocast else 0
        kept += length * width * (2 * (upcast + norm + c) + c)
    if config.text_width is not None:
        kept += length * width * (stream + 3 * c)
        outside += c * text_length * (config.text_width + width * (2 + 3 * config.depth))
    inputs = float(FULL * length * width)
    return Activations(kept, inputs, kept).repeated(config.depth) + Activations(outside, outside)


def token_loss_bytes(config: PriorConfig, batch_size: int, chunk: int | None, numerics: Numerics) -> float:
    """What the loss of a prior holds at its peak; see `token_loss`."""
    positions = batch_size * config.num_tokens
    if chunk is None:  # logits, their log-softmax, and that of the unsmoothed loss or the gradient
        return 3.0 * FULL * positions * config.vocab_size
    matrix, logits = config.width * config.vocab_size, min(chunk, positions) * config.vocab_size
    gradients = FULL * (config.width * positions + matrix)
    product = numerics.compute * matrix  # one chunk's part of the weight's gradient
    halves = numerics.compute * (matrix + logits) if numerics.autocast else 0  # copies of weight and logits
    return float(gradients + product + halves + FULL * logits)


def _block(width: int, head_dim: int, mlp_ratio: float, length: int, rows: int, numerics: Numerics) -> Activations:
    """A block with normalised queries and keys, L positions in and Q out."""
    c, hidden = numerics.compute, swiglu_width(width, mlp_ratio)
    norms = FULL * width * (2 * length + 2 * rows)  # inputs of the four norms
    statistics = 2 * FULL * (length + rows) * (1 + width // head_dim)
    shared = length + (0 if rows == length else rows) + rows  # the inputs of the products, in float32
    cast = 2 * length + rows + 2 * rows  # and under autocast, one for each product
    attention = 3 * rows + 2 * length  # queries, output and its copy; keys, values
    kept = (
        norms + statistics + c * width * (attention + (cast if numerics.autocast else shared)) + c * 4 * rows * hidden
    )
    return Activations(kept, FULL * width * length, kept)
