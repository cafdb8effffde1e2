"""Measures a model on some pictures, for the checks.

All losses of an image use one time and one noise, its own, so that they differ only by the tokens. The time is close to
1, where the input contains little and the tokens must provide the rest.

Shapes: N images, B of a batch, C channels, K registers, D code dimensions.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from flextok_pl.contracts import Batch, default_budgets
from flextok_pl.diagnosis.tokens import Paired
from flextok_pl.keys import sample_generators
from flextok_pl.metrics.codes import position_entropy
from flextok_pl.models.objective import TrainingDraws, flow_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE
from flextok_pl.precision import full_precision

TIME = 0.9
"""Flow time of the losses: nine tenths noise."""


@dataclass(frozen=True)
class LatentMoments:
    """Spread of scaled latents over images and places."""

    means: list[float]  # of each channel
    stds: list[float]
    overall: float  # standard deviation of all values around their one mean

    @classmethod
    def of(cls, latents: Sequence[Tensor]) -> LatentMoments:
        """Measure batches of (B, C, h, w)."""
        channels = torch.cat([each.float().cpu().transpose(0, 1).flatten(1) for each in latents], 1)  # (C, N h w)
        stds = channels.std(1, correction=0)
        return cls(channels.mean(1).tolist(), stds.tolist(), float(channels.std(correction=0)))


@dataclass(frozen=True)
class TokenizerProbe:
    """Measurements of a tokenizer on N images."""

    samples: int
    latents: LatentMoments
    entropies: list[float]  # bits, by position
    level_shares: list[list[float]]  # of each level, by code dimension
    codes: int  # that these are shares of
    own: float  # mean loss with all of an image's own tokens
    null: float  # mean loss with none, under the null condition
    other: Paired  # what another image's tokens cost
    other_over_null: Paired  # what they cost over no condition
    positions: dict[tuple[int, int], Paired]  # what another image's tokens in these positions cost
    at_budget: dict[int, float]  # mean loss with an image's first tokens
    gains: dict[int, Paired]  # of a budget over the one before


def probe_latents(vae: VAE, batches: Iterable[Batch], device: torch.device) -> LatentMoments:
    """Measure the spread of an autoencoder's scaled latents on batches of images."""
    with torch.no_grad(), full_precision(device):
        return LatentMoments.of([vae.encode(batch["image"].to(device)) for batch in batches])


@torch.no_grad()
def probe_tokenizer(tok: FlexTok, batches: Iterable[Batch], device: torch.device) -> TokenizerProbe:
    """Measure a tokenizer on batches of at least two images with keys."""
    latents, tokens = [], []
    losses: dict[str, list[Tensor]] = {}
    groups = position_groups(tok.num_registers)
    kept = default_budgets(tok.num_registers)
    for batch in batches:
        if len(batch["key"]) < 2:
            continue
        scaled = tok.encode_latents(batch["image"].to(device))
        own = tok.tokenize_latents(scaled)  # (B, K)
        latents.append(scaled.cpu())
        tokens.append(own.cpu())
        for name, values in _losses(tok, scaled, own, batch["key"], groups, kept).items():
            losses.setdefault(name, []).append(values.cpu().double())
    if not tokens:
        raise ValueError("no batch has two images or more: give more of them (num_samples)")
    found = {name: torch.cat(values) for name, values in losses.items()}  # (N,) each
    ids = torch.cat(tokens)  # (N, K)
    full = found[f"k={kept[-1]}"]
    return TokenizerProbe(
        samples=len(ids),
        latents=LatentMoments.of(latents),
        entropies=position_entropy(ids).tolist(),
        level_shares=level_shares(tok, ids.to(device)),
        codes=ids.numel(),
        own=float(full.mean()),
        null=float(found["null"].mean()),
        other=paired(found["other"] - full),
        other_over_null=paired(found["other"] - found["null"]),
        positions={group: paired(found[f"{group}"] - full) for group in groups},
        at_budget={k: float(found[f"k={k}"].mean()) for k in kept},
        gains={k: paired(found[f"k={before}"] - found[f"k={k}"]) for before, k in pairwise(kept)},
    )


def own_loss(tok: FlexTok, batches: Iterable[Batch], device: torch.device) -> float:
    """Measure only `own` of `probe_tokenizer`."""
    losses = []
    with torch.no_grad():
        for batch in batches:
            scaled = tok.encode_latents(batch["image"].to(device))
            draws = _draws(tok, scaled, batch["key"])
            with full_precision(device):
                losses.append(flow_loss(tok, scaled, draws).loss.cpu().double())
    return float(torch.cat(losses).mean())


def position_groups(num_registers: int) -> list[tuple[int, int]]:
    """Ranges of positions, from 1, that end at a power of two: 1, 2, 3-4, 5-8, ... K."""
    ends = default_budgets(num_registers)
    return [(before + 1, end) for before, end in zip([0, *ends], ends, strict=False)]


def level_shares(tok: FlexTok, tokens: Tensor) -> list[list[float]]:
    """Share of each level of each code dimension among tokens of any shape."""
    quantizer = tok.quantizer
    codes = quantizer.tokens_to_codes(tokens.flatten())  # (T, D) in [-1, 1]
    shares = []
    for dimension, levels in enumerate(quantizer.levels):
        half = levels // 2
        digits = (codes[:, dimension] * half).round().long() + half
        shares.append((torch.bincount(digits, minlength=levels).float() / len(digits)).tolist())
    return shares


def paired(differences: Tensor) -> Paired:
    """Mean and standard error of (N,) differences."""
    error = differences.std() / len(differences) ** 0.5 if len(differences) > 1 else torch.zeros(())
    return Paired(float(differences.mean()), float(error))


def _losses(
    tok: FlexTok,
    latents: Tensor,
    own: Tensor,
    keys: Sequence[str],
    groups: Sequence[tuple[int, int]],
    kept: Sequence[int],
) -> dict[str, Tensor]:
    """Name of a choice of tokens -> (B,) losses with them."""
    draws = _draws(tok, latents, keys)
    others = own.roll(1, 0)  # another image's
    choices = {"other": others}
    for first, last in groups:
        mixed = own.clone()
        mixed[:, first - 1 : last] = others[:, first - 1 : last]
        choices[f"{(first, last)}"] = mixed
    with full_precision(latents.device):
        found = {name: flow_loss(tok, latents, draws, tokens=each).loss for name, each in choices.items()}
        for k in kept:
            at = draws._replace(num_tokens=torch.full((len(keys),), k))
            found[f"k={k}"] = flow_loss(tok, latents, at, tokens=own).loss
        none = draws._replace(null=torch.ones(len(keys), dtype=torch.bool))
        found["null"] = flow_loss(tok, latents, none, tokens=own).loss
    return found


def _draws(tok: FlexTok, latents: Tensor, keys: Sequence[str]) -> TrainingDraws:
    """Draw each image's own noise at the fixed time, and keep all of its tokens."""
    count, regresses = len(keys), tok.config.objective == "mse"
    noise = [torch.randn(latents.shape[1:], generator=each) for each in sample_generators(keys, 0, "doctor")]
    return TrainingDraws(
        torch.zeros_like(latents) if regresses else torch.stack(noise).to(latents.device),
        torch.full((count,), 1.0 if regresses else TIME),
        torch.full((count,), tok.num_registers),
        torch.zeros(count, dtype=torch.bool),
    )
