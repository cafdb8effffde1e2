"""The tokenizer's training objective: rectified flow on latents, with nested dropout over the tokens.

- One loss, the error of the velocity, trains encoder and decoder. Its gradient reaches the codes through FSQ.
- Each image keeps a random number of first tokens, so early tokens learn what matters most. Some images keep none, for
  guidance.
- All randomness of a step is drawn first, for the batches of all processes, so it does not depend on their number.
- The baseline `objective="mse"` has zero noise and t = 1: its velocity is minus the latents, and its error that of the
  decoded latents.

Shapes: B batch, C channels, h x w latent, K registers, N patches, D decoder width.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig
from flextok_pl.flow.nested_dropout import budgets_from_uniform
from flextok_pl.flow.noise import seeded_normal
from flextok_pl.flow.rectified import interpolate, lattice, sample_timesteps, stratify, velocity_loss, velocity_target
from flextok_pl.layers.frozen import is_frozen
from flextok_pl.layers.packing import places
from flextok_pl.models.decoder import token_layout
from flextok_pl.models.encoder import code_layout
from flextok_pl.models.routing import Route
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.precision import accumulation_dtype, full_precision
from flextok_pl.transfer import send


class TrainingDraws(NamedTuple):
    """Everything random in one training step.

    Noise is on the latents' device. The rest is on the CPU, because it decides which positions to compute.
    """

    noise: Tensor  # (B, C, h, w) standard normal, or zeros for the objective `mse`
    t: Tensor  # (B,) float32 flow times; 1 for `mse`
    num_tokens: Tensor  # (B,) int64 budgets
    null: Tensor  # (B,) bool, images whose condition is dropped


class FlowLoss(NamedTuple):
    """Result of `flow_loss`."""

    loss: Tensor  # (B,) mean squared velocity error of each image
    patch_features: Tensor | None  # (B, N, D) decoder features for REPA, if the model has a `repa_layer`


def sample_draws(
    config: FlexTokConfig,
    latents: Tensor,  # (B, C, h, w) of this rank; gives batch size, shape and device
    generator: torch.Generator,  # on the CPU, in the same state on all ranks
    timestep_shift: float = 1.0,
    pure_noise: float = 0.0,  # probability of t = 1 instead of the law's draw
    stratified_budgets: bool = False,
    rank: int = 0,
    world_size: int = 1,  # all processes have B images
) -> TrainingDraws:
    """Draw what a training step needs for the images of all ranks; take every `world_size`-th from `rank` on.

    A step therefore does not depend on the number of processes, and times and budgets are stratified over the whole
    batch. Each image's noise is a function of a seed from the generator. Under pure noise only the tokens describe the
    image, so those images train the encoder like an autoencoder's.
    """
    batch = len(latents) * world_size
    num_tokens, null = _sample_budgets(config, batch, generator, stratified_budgets)
    mine = slice(rank, None, world_size)
    num_tokens, null = num_tokens[mine].contiguous(), null[mine].contiguous()
    if config.objective == "mse":
        return TrainingDraws(torch.zeros_like(latents), torch.ones(len(latents)), num_tokens, null)
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
    seeds = torch.randint(2**62, (batch,), generator=generator)[mine]
    noise = seeded_normal(send(seeds, latents.device), latents.shape[1:])
    return TrainingDraws(noise, t[mine], num_tokens, null)


def _sample_budgets(
    config: FlexTokConfig, batch: int, generator: torch.Generator, stratified: bool
) -> tuple[Tensor, Tensor]:
    """Budgets and null conditions from one uniform number for each image: (B,) int64 and bool.

    Numbers in equal strata keep the sum of budgets almost the same in each step, on each process.
    """
    u = torch.rand(batch, generator=generator, dtype=accumulation_dtype("cpu"))
    if stratified:
        u = stratify(u)[lattice(batch, generator)]
    share = config.null_dropout
    null = u < share
    within = torch.where(null, u / share if share else u, (u - share) / (1 - share) if share < 1 else u)
    return budgets_from_uniform(config.nested_dropout, config.num_registers, within), null


def draws_of_each(config: FlexTokConfig, latents: Tensor, generators: Sequence[torch.Generator]) -> TrainingDraws:
    """`sample_draws` for each image from its own generator, independent of the rest of the batch."""
    each = [sample_draws(config, latents[i : i + 1], generator) for i, generator in enumerate(generators)]
    return TrainingDraws(*(torch.cat(parts) for parts in zip(*each, strict=True)))


def kept_codes(tokenizer: FlexTok, latents: Tensor, kept: Tensor) -> Tensor:
    """Quantised codes of each image's first `kept` tokens, (B,) on the CPU, concatenated; latents are (B, C, h, w).

    At least one image is encoded, so that all weights have gradients.
    """
    encoded = kept if kept.any() else torch.ones_like(kept)[:1]
    images = encoded.nonzero().flatten()
    clean = latents if len(images) == len(latents) else latents.index_select(0, send(images, latents.device))
    layout = code_layout(tokenizer.config, clean, encoded[images])
    with tokenizing(clean.device) if is_frozen(tokenizer.encoder) else nullcontext():
        return tokenizer.quantizer(tokenizer.encoder(clean, layout))  # type: ignore[no-any-return]


def flow_loss(
    tokenizer: FlexTok,
    latents: Tensor,  # (B, C, h, w) clean, scaled
    draws: TrainingDraws,
    *,
    tokens: Tensor | None = None,  # (B, K) int64 to decode from instead of the images' own
    route: Route | None = None,  # of patches around middle blocks of the decoder
) -> FlowLoss:
    """Error of the decoder's velocity, with gradients to decoder and encoder, or to the decoder given `tokens`.

    Only what an image keeps is computed: no registers beyond its budget, and no code of an image without condition. A
    frozen encoder runs as in `tokenize`, so that the decoder trains on the same tokens.
    """
    config = tokenizer.config
    kept = draws.num_tokens.masked_fill(draws.null, 0)
    if tokens is None:
        codes = kept_codes(tokenizer, latents, kept)
    else:
        owner, place = places(kept)
        rows = send(owner * tokens.shape[1] + place, tokens.device)
        codes = tokenizer.quantizer.tokens_to_codes(tokens.flatten().index_select(0, rows))
    t = send(draws.t, latents.device)
    x_t = interpolate(latents, draws.noise, t)
    velocity, features = tokenizer.decoder(x_t, t, codes, token_layout(config, x_t, kept, draws.null, route))
    return FlowLoss(velocity_loss(velocity, velocity_target(latents, draws.noise)), features)


@contextmanager
def tokenizing(device: torch.device) -> Iterator[None]:
    """Compute in float32 without gradients, whatever the precision of the training."""
    with torch.no_grad(), full_precision(device):
        yield
