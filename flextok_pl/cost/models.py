"""Counts the training cost of the models: each runs one sample, at a few budgets from which the others follow.

Shapes: B batch, K registers, k <= K kept ones, V vocabulary, T text positions.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import lru_cache
from math import prod
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.cost.count import (
    BATCHES,
    FULL,
    Activations,
    Count,
    Flops,
    Model,
    Numerics,
    Part,
    count_activations,
    count_flops,
)
from flextok_pl.flow.nested_dropout import budget_probabilities
from flextok_pl.flow.rectified import velocity_loss, velocity_target
from flextok_pl.models.decoder import FlowDecoder, TokenLayout, token_layout
from flextok_pl.models.discriminator import PatchDiscriminator, hinge_loss
from flextok_pl.models.encoder import CodeLayout, RegisterEncoder, code_layout
from flextok_pl.models.fsq import FSQ
from flextok_pl.models.irepa import Projection, build_projection
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.routing import Routing
from flextok_pl.models.starting import train_only
from flextok_pl.models.teacher import alignment_loss
from flextok_pl.models.vae import VAE
from flextok_pl.precision import accumulation_dtype

Grid = tuple[int, int]
Trained = tuple[str, ...] | None
"""Beginnings of the names of the trained weights; None for all."""
LayoutT = TypeVar("LayoutT", CodeLayout, TokenLayout)
CostT = TypeVar("CostT", Flops, Activations)
RARE_DEVIATIONS = 3.09  # of a normal distribution: one case of a thousand is beyond


# The parts


def encoder(config: FlexTokConfig, kept: int, grid: Grid, train: Trained = None) -> Part:
    """Register encoder and quantiser: k codes of images whose patches form this grid."""

    def part(depth: int, checkpointing: bool) -> Model:
        network, quantizer = RegisterEncoder(replace(config, encoder_depth=depth)), FSQ(config.fsq_levels)
        network.activation_checkpointing = checkpointing
        train_only(nn.ModuleDict({"encoder": network}), train)
        quantizer.to(network.patch_posemb.device)

        def step(batch: int) -> Tensor:
            latents = _latents(network, config, grid, batch)
            return quantizer(network(latents, _without_values(layouts[batch], latents))).sum()  # type: ignore[no-any-return]

        return Model(step, network.blocks)

    layouts = {batch: code_layout(config, *_images(config, kept, grid, batch)) for batch in BATCHES}
    return part


def decoder(config: FlexTokConfig, kept: int, grid: Grid, train: Trained = None) -> Part:
    """Flow decoder and its loss, given k codes, or none."""

    def part(depth: int, checkpointing: bool) -> Model:
        network = FlowDecoder(replace(config, decoder_depth=depth, repa_layer=None))
        network.activation_checkpointing = checkpointing
        train_only(nn.ModuleDict({"decoder": network}), train)

        def step(batch: int) -> Tensor:
            latents, noise = (_latents(network, config, grid, batch) for _ in range(2))
            codes = latents.new_empty(batch * kept, len(config.fsq_levels), requires_grad=encoded)
            layout = _without_values(layouts[batch], latents)
            velocity = network(latents, latents.new_empty(batch), codes, layout).velocity
            return velocity_loss(velocity, velocity_target(latents, noise)).mean()

        return Model(step, network.blocks)

    encoded = train is None or any(part.partition(".")[0] == "encoder" for part in train)  # with gradients
    layouts = {batch: token_layout(config, *_images(config, kept, grid, batch)) for batch in BATCHES}
    return part


def projection(kind: Projection, width: int, features: int, grid: Grid) -> Part:
    """REPA's projection from decoder width to the width of the teacher's features, and its loss; it has no blocks."""

    def part(depth: int, checkpointing: bool) -> Model:
        head = build_projection(kind, width, features)

        def step(batch: int) -> Tensor:
            patches = next(head.parameters()).new_empty(()).expand(batch, grid[0] * grid[1], width)  # the decoder's own
            patches.requires_grad_()
            return alignment_loss(head(patches, grid), patches.new_empty(batch, features, *grid))

        return Model(step)

    return part


def prior(
    config: PriorConfig, text_length: int, fused_norms: bool = False, logits: bool = False, train: Trained = None
) -> Part:
    """A prior on a sequence of tokens, with a text of T positions if it takes one, to its last norm or its logits."""

    def part(depth: int, checkpointing: bool) -> Model:
        network = Prior(replace(config, depth=depth))
        network.checkpoint_activations(checkpointing)
        train_only(network, train)
        for norm in network.modules():
            if isinstance(norm, nn.RMSNorm) and fused_norms:  # the CPU lacks this kernel, but has one as frugal
                norm.forward = _fused_norm(norm)  # type: ignore[method-assign, assignment]

        def step(batch: int) -> Tensor:
            tokens = torch.zeros(batch, config.num_tokens, dtype=torch.int64, device=network.device)
            text = None
            if config.text_width is not None:
                states = torch.empty(batch, text_length, config.text_width, device=network.device)
                text = TextStates(states, torch.ones(batch, text_length, dtype=torch.bool, device=network.device))
            hidden = network.hidden(tokens, text)
            return (network.head(hidden) if logits else hidden).sum()

        return Model(step, network.blocks)

    return part


def _images(config: FlexTokConfig, kept: int, grid: Grid, batch: int) -> tuple[Tensor, Tensor]:
    """Latents of B images and the registers that they keep, on the CPU."""
    size = (side * config.patch_size for side in grid)
    return torch.empty(batch, config.latent_channels, *size, device="cpu"), torch.full((batch,), kept, device="cpu")


def _without_values(layout: LayoutT, like: Tensor) -> LayoutT:
    """A layout whose indices have no values, as the tensors of a counted model."""
    return tree_map_only(Tensor, lambda each: like.new_empty(each.shape, dtype=each.dtype), layout)  # type: ignore[no-any-return]


def _latents(network: nn.Module, config: FlexTokConfig, grid: Grid, batch: int) -> Tensor:
    size = (side * config.patch_size for side in grid)
    return next(network.parameters()).new_empty(batch, config.latent_channels, *size)


def _fused_norm(norm: nn.RMSNorm) -> Callable[[Tensor], Tensor]:
    return lambda x: F.layer_norm(x.float(), norm.normalized_shape, norm.weight)


# Their costs


def _law(config: FlexTokConfig) -> Tensor:
    """(K+1,) probability of an image's number of tokens, 0 being the null condition."""
    law = budget_probabilities(config.nested_dropout, config.num_registers) * (1 - config.null_dropout)
    law[0] = config.null_dropout
    return law


@lru_cache(maxsize=64)
def tokenizer_flops(
    config: FlexTokConfig,
    grid: Grid | None = None,
    checkpointing: bool = False,
    routing: Routing | None = None,
    train: Trained = None,
) -> Flops:
    """Encoder and decoder per image, expected over the budgets of training; `grid` by default the position table's."""
    coding, decoding = _flops_at_every_budget(_shape(config), grid, checkpointing, routing, train)
    return Flops(*(_law(config) @ (coding + decoding)).tolist())


@lru_cache(maxsize=64)
def prior_flops(config: PriorConfig, text_length: int = 1, checkpointing: bool = False, train: Trained = None) -> Flops:
    """A prior on one sequence of tokens, which attends to T positions of a text if it takes one."""
    part = prior(config, text_length, False, True, train)
    return count_flops(part, config.depth, checkpointing, _apart(train, config.depth))


def tokenizer_activations(
    config: FlexTokConfig,
    numerics: Numerics,
    batch_size: int,
    grid: Grid | None = None,
    stratified: bool = False,
    routing: Routing | None = None,
    train: Trained = None,
) -> Activations:
    """Encoder and decoder, for a batch of B images whose budgets take as much as they do in one step of a thousand.

    That is the quantile of a normal distribution, or the mean if budgets are `stratified`. See `tokenizer_flops` for
    `grid`, and `all_blocks` for the parts that `train` leaves out.
    """
    law = _law(config)
    coding, decoding = _kept_at_every_budget(_shape(config), grid, numerics, routing, all_blocks(train))
    kept, inputs, _ = (_of_batch(law, each, batch_size, stratified) for each in (coding + decoding).unbind(1))
    largest = (_of_batch(law, each[:, 2], batch_size, stratified) for each in (coding, decoding))
    return Activations(kept, inputs, max(largest))


def _of_batch(law: Tensor, bytes_of_image: Tensor, batch_size: int, stratified: bool) -> float:
    """Memory of B images, given that of one image at each budget, (K+1,)."""
    mean = law @ bytes_of_image
    deviation = (law @ (bytes_of_image - mean).square()).sqrt()
    spread = 0.0 if stratified else RARE_DEVIATIONS / batch_size**0.5
    return batch_size * float((mean + spread * deviation).clamp(max=bytes_of_image[law > 0].max()))


@lru_cache(maxsize=64)
def distillation_flops(
    config: FlexTokConfig, num_steps: int, grid: Grid | None = None, checkpointing: bool = False
) -> Flops:
    """A student's steps per image, expected over the budgets of `config`, each with its loss; see `tokenizer_flops`."""
    _, decoding = _flops_at_every_budget(_shape(config), grid, checkpointing, None, None)
    return Flops(*(_law(config) @ decoding).tolist()) * num_steps


def distillation_activations(
    config: FlexTokConfig, num_steps: int, numerics: Numerics, batch_size: int, grid: Grid | None, stratified: bool
) -> Activations:
    """Memory that a student keeps of all its steps; see `tokenizer_activations`."""
    _, decoding = _kept_at_every_budget(_shape(config), grid, numerics, None, None)
    kept, inputs, largest = (_of_batch(_law(config), each, batch_size, stratified) for each in decoding.unbind(1))
    return Activations(num_steps * kept, num_steps * inputs, largest)


@lru_cache(maxsize=64)
def path_flops(config: FlexTokConfig, calls: int, unconditional: int, grid: Grid | None = None) -> float:
    """Operations that make an image's tokens and a guided path: passes of the decoder with tokens, and with none."""
    coding, decoding = _flops_at_every_budget(_shape(config), grid, False, None, None)
    return float(_law(config) @ (coding[:, 0] + calls * decoding[:, 0]) + unconditional * decoding[0, 0])


def all_blocks(train: Trained) -> Trained:
    """The same parts, and all blocks if it names some: memory is counted with few, and must not be planned too low."""
    return None if train is None else tuple(re.sub(r"\bblocks\.\d.*", "blocks", part) for part in train)


def _apart(train: Trained, depth: int) -> int:
    """Blocks that may differ in cost from later ones: the outer two if gradients do not reach all parts, or all."""
    if train is None:
        return 1
    return 2 if all_blocks(train) == train else depth


def _shape(config: FlexTokConfig) -> FlexTokConfig:
    """The configuration without options that do not change an image's cost, so that a sweep counts its trials once."""
    plain = replace(config, vae=None, repa_layer=None, nested_dropout="none", null_dropout=0.0, objective="flow")
    return replace(plain, trained_grids=())


@lru_cache(maxsize=64)
def _flops_at_every_budget(
    config: FlexTokConfig, grid: Grid | None, checkpointing: bool, routing: Routing | None, train: Trained
) -> tuple[Tensor, Tensor]:
    def count(part: Part, depth: int) -> Flops:
        return count_flops(part, depth, checkpointing, _apart(train, depth))

    return _at_every_budget(config, count, 2, grid, routing, train)


@lru_cache(maxsize=64)
def _kept_at_every_budget(
    config: FlexTokConfig, grid: Grid | None, numerics: Numerics, routing: Routing | None, train: Trained
) -> tuple[Tensor, Tensor]:
    return _at_every_budget(
        config, lambda part, depth: count_activations(part, depth, numerics), 1, grid, routing, train
    )


def _at_every_budget(
    config: FlexTokConfig,
    count: Callable[[Part, int], CostT],
    degree: int,
    grid: Grid | None,
    routing: Routing | None,
    train: Trained,
) -> tuple[Tensor, Tensor]:
    """Costs of encoder and decoder for an image of 0..K tokens, (K+1, fields) each.

    They are polynomials in the number: operations quadratic, bytes linear, as attention keeps no scores. An image
    without tokens is not encoded, and one with K has no position for missing ones.
    """
    size, most = grid or config.grid_size, config.num_registers

    def coding(kept: int) -> CostT:
        return count(encoder(config, kept, size, train), config.encoder_depth)

    def decoding(kept: int) -> CostT:
        whole = decoder(config, kept, size, train)
        if routing is None:
            return count(whole, config.decoder_depth)
        blocks, patches = routing.last - routing.first + 1, (1, routing.kept(prod(size)))
        registers = patches[1] if config.layout == "grid" else most
        routed = replace(config, grid_size=patches, num_registers=registers)
        part = decoder(routed, min(kept, registers), patches, train)
        return count(whole, config.decoder_depth - blocks) + (count(part, 1 + blocks) + count(part, 1) * -1)

    def interpolated(cost: Callable[[int], CostT], first: int, last: int) -> Tensor:
        wide = accumulation_dtype("cpu")
        nodes = torch.tensor(sorted({first + (last - first) * i // degree for i in range(degree + 1)}), dtype=wide)
        powers, budgets = torch.arange(len(nodes)), torch.arange(first, last + 1, dtype=wide)
        counted = torch.tensor([astuple(cost(int(node))) for node in nodes], dtype=nodes.dtype)
        weights: Tensor = budgets[:, None] ** powers @ torch.linalg.inv(nodes[:, None] ** powers)
        return weights @ counted

    coded = F.pad(interpolated(coding, 1, most), (0, 0, 1, 0))
    return coded, torch.cat([interpolated(decoding, 0, most - 1), interpolated(decoding, most, most)])


@lru_cache(maxsize=64)
def prior_activations(
    config: PriorConfig, numerics: Numerics, text_length: int = 1, train: Trained = None
) -> Activations:
    """A prior on one sequence, without the loss; see `prior_flops`."""
    part = prior(config, text_length, numerics.fused_norms, train=all_blocks(train))
    return count_activations(part, config.depth, numerics)


def token_loss_bytes(config: PriorConfig, batch_size: int, chunk: int | None, numerics: Numerics) -> float:
    """Peak memory of a prior's loss; see `token_loss`."""
    positions = batch_size * config.num_tokens
    if chunk is None:  # logits, their log-softmax, and that of the unsmoothed loss or the gradient
        return 3.0 * FULL * positions * config.vocab_size
    matrix, logits = config.width * config.vocab_size, min(chunk, positions) * config.vocab_size
    gradients = FULL * (config.width * positions + matrix)
    # Copies of the weight and the logits, and one chunk's part of the weight's gradient.
    halves = numerics.compute * (2 * matrix + logits) if numerics.autocast else 0
    return float(gradients + halves + FULL * logits)


def vae_cost(vae: VAE, discriminator: PatchDiscriminator | None, size: tuple[int, int]) -> tuple[Flops, float]:
    """(operations, bytes kept for the backward pass) of an autoencoder's training step, per image of (H, W) pixels.

    The networks are on the meta device. The adaptive weight of the adversarial loss, two gradients of one layer, is
    left out.
    """
    images = torch.empty(1, vae.config.image_channels, *size, device="meta")
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
