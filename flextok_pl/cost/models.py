"""What the models cost in training: each is run for one sample and counted, at some budgets that stand for all.

Shapes: B batch, K registers, k <= K computed registers, V vocabulary, T text positions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import astuple, replace
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.cost.count import (
    FULL,
    Activations,
    Count,
    Flops,
    Numerics,
    Part,
    Step,
    count_activations,
    count_flops,
)
from flextok_pl.flow.nested_dropout import budget_probabilities
from flextok_pl.flow.rectified import velocity_loss, velocity_target
from flextok_pl.models.decoder import FlowDecoder
from flextok_pl.models.discriminator import PatchDiscriminator, hinge_loss
from flextok_pl.models.encoder import RegisterEncoder
from flextok_pl.models.fsq import FSQ
from flextok_pl.models.irepa import Projection, build_projection
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.teacher import alignment_loss
from flextok_pl.models.vae import VAE

Grid = tuple[int, int]
RARE = 1e-3  # budgets larger than those planned for happen in this share of the steps


# The parts


def encoder(config: FlexTokConfig, kept: int, grid: Grid) -> Part:
    """Register encoder and quantiser: k codes of images of so many rows and columns of patches."""

    def part(depth: int, checkpointing: bool) -> Step:
        network, quantizer = RegisterEncoder(replace(config, encoder_depth=depth)), FSQ(config.fsq_levels)
        network.activation_checkpointing = checkpointing
        return lambda batch: quantizer(network(_latents(network, config, grid, batch), kept)).sum()

    return part


def decoder(config: FlexTokConfig, kept: int, grid: Grid) -> Part:
    """Flow decoder and its loss, given k codes."""

    def part(depth: int, checkpointing: bool) -> Step:
        network = FlowDecoder(replace(config, decoder_depth=depth, repa_layer=None))
        network.activation_checkpointing = checkpointing

        def step(batch: int) -> Tensor:
            latents, noise = (_latents(network, config, grid, batch) for _ in range(2))
            codes = latents.new_empty(batch, kept, len(config.fsq_levels), requires_grad=True)
            budgets, null = codes.new_full((batch,), kept, dtype=torch.int64), codes.new_zeros(batch, dtype=torch.bool)
            velocity = network(latents, latents.new_empty(batch), codes, budgets, null).velocity
            return velocity_loss(velocity, velocity_target(latents, noise)).mean()

        return step

    return part


def projection(kind: Projection, width: int, features: int, grid: Grid) -> Part:
    """REPA's projection from decoder width to the width of the teacher's features, and its loss; it has no blocks."""

    def part(depth: int, checkpointing: bool) -> Step:
        head = build_projection(kind, width, features)

        def step(batch: int) -> Tensor:
            patches = next(head.parameters()).new_empty(()).expand(batch, grid[0] * grid[1], width)  # the decoder's own
            patches.requires_grad_()
            return alignment_loss(head(patches, grid), patches.new_empty(batch, features, *grid))

        return step

    return part


def prior(config: PriorConfig, text_length: int, fused_norms: bool = False, logits: bool = False) -> Part:
    """A prior on a sequence of tokens, with a text of T positions if it takes one, to its last norm or its logits."""

    def part(depth: int, checkpointing: bool) -> Step:
        network = Prior(replace(config, depth=depth))
        network.checkpoint_activations(checkpointing)
        for norm in network.modules():
            if isinstance(norm, nn.RMSNorm) and fused_norms:  # the CPU has no kernel for it, but for one as frugal
                norm.forward = _fused_norm(norm)  # type: ignore[method-assign, assignment]

        def step(batch: int) -> Tensor:
            tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64, device=network.device)
            text = None
            if config.text_width is not None:
                states = torch.empty(batch, text_length, config.text_width, device=network.device)
                text = TextStates(states, torch.ones(batch, text_length, dtype=torch.bool, device=network.device))
            hidden = network.hidden(tokens, text)
            return (network.head(hidden) if logits else hidden).sum()

        return step

    return part


def _latents(network: nn.Module, config: FlexTokConfig, grid: Grid, batch: int) -> Tensor:
    size = (side * config.patch_size for side in grid)
    return next(network.parameters()).new_empty(batch, config.latent_channels, *size)


def _fused_norm(norm: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: F.layer_norm(x.float(), norm.normalized_shape, norm.weight)


# Their costs


class BudgetGroup(NamedTuple):
    """A part of a batch that is sorted by budget."""

    size: int  # images
    longest: Tensor  # (K+1,) probability of each number of registers that the part computes


def budget_groups(config: FlexTokConfig, batch_size: int, groups: int) -> list[BudgetGroup]:
    """How many registers each of the parts of a sorted batch of B images computes; see `flow_loss`.

    The largest budget of the first r images in order is at most k where at least r of the B budgets are: a binomial
    tail in the law's distribution function at k.
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
        parts.append(BudgetGroup(len(rows), cumulative.diff(prepend=cumulative.new_zeros(1))))
    return parts


@lru_cache(maxsize=64)
def tokenizer_flops(
    config: FlexTokConfig,
    batch_size: int = 1,
    groups: int = 1,
    grid: Grid | None = None,
    checkpointing: bool = False,
) -> Flops:
    """Encoder and decoder per image of a batch of B on one device, expected over the budgets of training.

    `groups` is the training's `budget_groups`, `grid` by default that of the position table.
    """
    parts = budget_groups(config, batch_size, groups)
    longest = torch.stack([group.longest * (group.size / batch_size) for group in parts]).sum(0)
    coding, decoding = _flops_at_every_budget(_shape(config), grid, checkpointing)
    return Flops(*(longest @ coding).tolist()) + Flops(*(longest @ decoding).tolist())


@lru_cache(maxsize=64)
def prior_flops(config: PriorConfig, text_length: int = 1, checkpointing: bool = False) -> Flops:
    """A prior on one sequence of tokens, which attends to T positions of a text if it takes one."""
    return count_flops(prior(config, text_length, logits=True), config.depth, checkpointing)


def tokenizer_activations(
    config: FlexTokConfig, numerics: Numerics, batch_size: int, groups: int, grid: Grid | None = None
) -> Activations:
    """Encoder and decoder, for a batch of B images whose budgets are as large as they are in one step of a thousand.

    All parts of the batch are kept until the backward pass; see `tokenizer_flops` for `groups` and `grid`.
    """
    coding, decoding = _kept_at_every_budget(_shape(config), grid, numerics)
    total = Activations()
    for group in budget_groups(config, batch_size, groups):
        longest = int(torch.searchsorted(group.longest.cumsum(0), 1 - RARE))
        image = Activations(*coding[longest].tolist()) + Activations(*decoding[longest].tolist())
        total += image * group.size
    return total


def _shape(config: FlexTokConfig) -> FlexTokConfig:
    """The configuration without what changes no cost of an image, so that the trials of a sweep are counted once."""
    return replace(config, vae=None, repa_layer=None, nested_dropout="none", null_dropout=0.0, objective="flow")


@lru_cache(maxsize=64)
def _flops_at_every_budget(config: FlexTokConfig, grid: Grid | None, checkpointing: bool) -> tuple[Tensor, Tensor]:
    return _at_every_budget(config, lambda part, depth: count_flops(part, depth, checkpointing), 2, grid)


@lru_cache(maxsize=64)
def _kept_at_every_budget(config: FlexTokConfig, grid: Grid | None, numerics: Numerics) -> tuple[Tensor, Tensor]:
    return _at_every_budget(config, lambda part, depth: count_activations(part, depth, numerics), 1, grid)


def _at_every_budget(
    config: FlexTokConfig, count: Callable[[Part, int], Flops | Activations], degree: int, grid: Grid | None
) -> tuple[Tensor, Tensor]:
    """Costs of encoder and decoder per image, (K+1, fields) each, by the number of registers computed; 0 is as 1.

    They are polynomials in it: operations quadratic, bytes linear, as attention keeps no scores. Beside K-1 tokens the
    decoder computes the one that stands for the dropped ones, and so all that it does for K.
    """
    size, most = grid or config.grid_size, config.num_registers
    last = most if config.layout == "grid" else max(most - 1, 1)

    def interpolated(cost: Callable[[int], Flops | Activations], last: int) -> Tensor:
        nodes = torch.tensor(sorted({1 + (last - 1) * i // degree for i in range(degree + 1)}), dtype=torch.float64)
        powers, budgets = torch.arange(len(nodes)), torch.arange(most + 1).clamp(1, last).to(nodes)
        counted = torch.tensor([astuple(cost(int(node))) for node in nodes], dtype=nodes.dtype)
        weights: Tensor = budgets[:, None] ** powers @ torch.linalg.inv(nodes[:, None] ** powers)
        return weights @ counted

    coding = interpolated(lambda kept: count(encoder(config, kept, size), config.encoder_depth), most)
    return coding, interpolated(lambda kept: count(decoder(config, kept, size), config.decoder_depth), last)


@lru_cache(maxsize=64)
def prior_activations(config: PriorConfig, numerics: Numerics, text_length: int = 1) -> Activations:
    """A prior on one sequence, without the loss; see `prior_flops`."""
    return count_activations(prior(config, text_length, numerics.fused_norms), config.depth, numerics)


def token_loss_bytes(config: PriorConfig, batch_size: int, chunk: int | None, numerics: Numerics) -> float:
    """What the loss of a prior holds at its peak; see `token_loss`."""
    positions = batch_size * config.num_tokens
    if chunk is None:  # logits, their log-softmax, and that of the unsmoothed loss or the gradient
        return 3.0 * FULL * positions * config.vocab_size
    matrix, logits = config.width * config.vocab_size, min(chunk, positions) * config.vocab_size
    gradients = FULL * (config.width * positions + matrix)
    # Copies of the weight and the logits, and one chunk's part of the weight's gradient.
    halves = numerics.compute * (2 * matrix + logits) if numerics.autocast else 0
    return float(gradients + halves + FULL * logits)


def vae_cost(vae: VAE, discriminator: PatchDiscriminator | None, image_size: int) -> tuple[Flops, float]:
    """(operations, bytes kept for the backward pass) of an autoencoder's training step, per image of S pixels.

    The networks are on the meta device. The adaptive weight of the adversarial loss, two gradients of one layer, is
    left out.
    """
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    with Count() as count:
        _, outputs = vae(images)
        losses = [F.l1_loss(outputs, images)]
        if discriminator is not None:
            discriminator.requires_grad_(False)
            losses.append(-discriminator(outputs).mean())
            discriminator.requires_grad_(True)
            real, fake = discriminator(torch.cat([images, outputs.detach()])).chunk(2)
            losses.append(hinge_loss(real, fake))
    return Flops(float(count.operations), float(count.backward)), float(count.peak)
