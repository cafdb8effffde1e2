"""The tokenizer's training objective: rectified flow on latents, with nested dropout over the tokens.

What is special about it:
- One loss trains encoder and decoder: the error of the velocity, whose gradient reaches the codes through FSQ.
- Each image keeps a random number of first tokens, so early tokens learn what matters most; some images keep none, for
  guidance.
- All randomness of a step is drawn first, for the batches of all processes, so it does not depend on their number.
- The baseline `objective="mse"` is the case of zero noise at t = 1: the velocity is then minus the latents, and its
  error that of the decoded latents.

Shapes: B batch, C channels, h x w latent, K registers, N patches, D decoder width.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig
from flextok_pl.flow.nested_dropout import sample_num_tokens
from flextok_pl.flow.rectified import interpolate, sample_timesteps, velocity_loss, velocity_target
from flextok_pl.models.tokenizer import FlexTok


class TrainingDraws(NamedTuple):
    """Everything random in one training step.

    Noise and times are on the latents' device; the rest is on the CPU, where it decides how many registers to compute.
    """

    noise: Tensor  # (B, C, h, w) standard normal, or zeros for the objective `mse`
    t: Tensor  # (B,) float32 flow times; 1 for `mse`
    num_tokens: Tensor  # (B,) int64 budgets
    null: Tensor  # (B,) bool, images whose condition is dropped


class FlowLoss(NamedTuple):
    """Result of `flow_loss`."""

    loss: Tensor  # (B,) mean squared velocity error of each image
    patch_features: Tensor | None  # (B, N, D) decoder features for REPA, where the model has a `repa_layer`


def sample_draws(
    config: FlexTokConfig,
    latents: Tensor,  # (B, C, h, w) of this rank; gives batch size, shape and device
    generator: torch.Generator,  # on the CPU, in the same state on all ranks
    timestep_shift: float = 1.0,
    pure_noise: float = 0.0,  # probability of t = 1 in place of the law's draw
    rank: int = 0,
    world_size: int = 1,  # all processes have B images
) -> TrainingDraws:
    """Draw what a training step needs, for the images of all ranks, and take every `world_size`-th from `rank` on.

    So a step does not depend on the number of processes, and times are stratified over the whole batch. Each image's
    noise is drawn on the latents' device, from a seed that the generator yields. Under pure noise only the tokens
    describe the image, so those images train the encoder as an autoencoder would be trained.
    """
    batch = len(latents) * world_size
    num_tokens = sample_num_tokens(config.nested_dropout, batch, config.num_registers, generator)
    null = torch.rand(batch, generator=generator) < config.null_dropout
    mine = slice(rank, None, world_size)
    num_tokens, null = num_tokens[mine].contiguous(), null[mine].contiguous()
    if config.objective == "mse":
        return TrainingDraws(
            torch.zeros_like(latents), torch.ones(len(latents), device=latents.device), num_tokens, null
        )
    t = sample_timesteps(
        config.timestep_law,
        batch,
        generator,
        mode_scale=config.mode_scale,
        shift=timestep_shift,
        stratified=config.stratified,
    )
    if pure_noise > 0:
        t = torch.where(torch.rand(batch, generator=generator) < pure_noise, 1.0, t)
    seeds = torch.randint(2**62, (batch,), generator=generator)
    noise = torch.empty_like(latents)
    noise_generator = torch.Generator(latents.device)
    for row, seed in zip(noise, seeds[mine].tolist(), strict=True):
        row.normal_(generator=noise_generator.manual_seed(seed))
    return TrainingDraws(noise, t[mine].to(latents.device), num_tokens, null)


def draws_of_each(config: FlexTokConfig, latents: Tensor, generators: Sequence[torch.Generator]) -> TrainingDraws:
    """`sample_draws` for each image from its own generator, so that they do not depend on the rest of the batch."""
    latents = latents.contiguous()  # noise fills the memory in its order, which may depend on the size of the batch
    each = [sample_draws(config, latents[i : i + 1], generator) for i, generator in enumerate(generators)]
    return TrainingDraws(*(torch.cat(parts) for parts in zip(*each, strict=True)))


def flow_loss(
    tokenizer: FlexTok,
    latents: Tensor,  # (B, C, h, w) clean, scaled
    draws: TrainingDraws,
    *,
    tokens: Tensor | None = None,  # (B, K) int64 to decode from in place of the images' own
    budget_groups: int = 1,
) -> FlowLoss:
    """Velocity error of the decoder given the encoder's quantised codes, with gradients to both, or given `tokens`.

    The batch is sorted into `budget_groups` parts by budget. Registers that no image of a part keeps are not computed,
    so more parts compute less; the result does not depend on their number.
    """
    x_t = interpolate(latents, draws.noise, draws.t)
    kept = draws.num_tokens.masked_fill(draws.null, 0)
    order = kept.argsort(stable=True)
    longest = [max(int(kept[rows].max()), 1) for rows in order.chunk(budget_groups)]
    # All that a GPU needs goes there before the passes: a copy between them would wait for the end of the last.
    order, kept, null = (values.to(latents.device) for values in (order, kept, draws.null))
    passes = []
    for rows, length in zip(order.chunk(budget_groups), longest, strict=True):
        if tokens is None:
            codes = tokenizer.quantizer(tokenizer.encode(latents[rows], length))
        else:
            codes = tokenizer.quantizer.tokens_to_codes(tokens[rows, :length])
        passes.append(tokenizer.decoder(x_t[rows], draws.t[rows], codes, kept[rows], null[rows]))
    inverse = order.argsort()
    velocity = torch.cat([p.velocity for p in passes])[inverse]
    features = [p.patch_features for p in passes if p.patch_features is not None]
    loss = velocity_loss(velocity, velocity_target(latents, draws.noise))
    return FlowLoss(loss, torch.cat(features)[inverse] if features else None)
