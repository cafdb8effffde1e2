"""Planned memory against what autograd keeps, and against the peak of real steps."""

import dataclasses
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from flextok_pl.config import FlexTokConfig, PriorConfig, VAEConfig
from flextok_pl.cost.activations import (
    Numerics,
    prior_activations,
    projection_activations,
    token_loss_bytes,
    tokenizer_activations,
)
from flextok_pl.cost.machines import machine
from flextok_pl.cost.meta import PeakMemory, SavedMemory, vae_step
from flextok_pl.cost.plan import Setup, memory
from flextok_pl.cost.workload import prior_workload, tokenizer_workload
from flextok_pl.models.objective import flow_loss, sample_draws
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.teacher import ProjectionHead, alignment_loss
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.models.vae import VAE

BATCH = 4
TOKENIZER = FlexTokConfig(
    vae=None,
    encoder_width=128,
    encoder_depth=3,
    decoder_width=192,
    decoder_depth=4,
    num_registers=64,
    grid_size=(8, 8),
    repa_layer=None,
)
PRIOR = PriorConfig(num_classes=3, vocab_size=1000, num_tokens=64, depth=4, width=128, head_dim=32)
PRIORS = {
    "class": PRIOR,
    "normalised": dataclasses.replace(PRIOR, qk_norm=True),
    "text": dataclasses.replace(PRIOR, num_classes=0, text_width=24),
}


def autocast(half: bool):
    return torch.autocast("cpu", torch.bfloat16) if half else nullcontext()


def linear_bytes(module: nn.Module, half: bool) -> int:
    """What autocast's copies of the weights take; autograd keeps them, too."""
    return half * 2 * sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def latents_of(config: FlexTokConfig, batch: int = BATCH) -> torch.Tensor:
    return torch.randn(batch, config.latent_channels, *(side * config.patch_size for side in config.grid_size))


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("law", ["none", "uniform"])
@pytest.mark.parametrize("options", [{}, {"causal_registers": False}, {"layout": "grid"}, {"objective": "mse"}])
def test_tokenizer(options: dict[str, object], half: bool, checkpointing: bool, law: str) -> None:
    groups = 2
    config = dataclasses.replace(TOKENIZER, nested_dropout=law, null_dropout=0.0, **options)
    model = FlexTok(config)
    model.checkpoint_activations(checkpointing)
    latents, saved = latents_of(config), SavedMemory(model)
    draws = sample_draws(config, latents, torch.Generator().manual_seed(0))
    if law == "uniform":  # the largest that are planned for
        draws = draws._replace(num_tokens=torch.tensor([57, 58, 64, 64]))
    with saved, autocast(half):
        flow_loss(model, latents, draws, budget_groups=groups)
    planned = tokenizer_activations(config, Numerics(2 if half else 4, fused_norms=False), BATCH, groups)
    if checkpointing:  # the hooks of a checkpoint keep its inputs out of sight of ours: no more than planned
        assert saved.total < planned.inputs * 1.05 + linear_bytes(model, half)
        return
    assert planned.kept + linear_bytes(model, half) == pytest.approx(saved.total, rel=0.05)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("name", PRIORS)
def test_prior(name: str, half: bool) -> None:
    config, length = PRIORS[name], 20
    model = Prior(config)
    tokens, saved = torch.randint(config.vocab_size, (BATCH, config.num_tokens)), SavedMemory(model)
    condition = torch.zeros(BATCH, dtype=torch.int64)
    if name == "text":
        condition = TextStates(torch.randn(BATCH, length, 24), torch.ones(BATCH, length, dtype=torch.bool))
    with saved, autocast(half):
        model.hidden(tokens, condition)
    planned = prior_activations(config, Numerics(2 if half else 4, fused_norms=False), length) * BATCH
    copies = linear_bytes(model, half) - linear_bytes(model.head, half)
    assert planned.kept + copies == pytest.approx(saved.total, rel=0.02)


@pytest.mark.parametrize("half", [False, True])
def test_projection_to_the_teacher(half: bool) -> None:
    width, features, patches = 96, 120, 64
    head = ProjectionHead(width, features)
    inputs, saved = torch.randn(BATCH, patches, width, requires_grad=True), SavedMemory(head)
    with saved, autocast(half):
        alignment_loss(head(inputs), torch.randn(BATCH, features, 8, 8))
    planned = projection_activations(width, 2048, features, patches, Numerics(2 if half else 4)) * BATCH
    assert planned.kept + linear_bytes(head, half) == pytest.approx(saved.total, rel=0.05)


def peak_of_steps(model: nn.Module, loss_of, half: bool) -> int:
    """Peak of three steps in Lightning's order: gradients go after the next forward pass."""
    with PeakMemory() as seen:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        for _ in range(3):
            with autocast(half):
                loss = loss_of()
            optimizer.zero_grad()
            loss.backward()
            del loss
            optimizer.step()
    return seen.peak + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def setup(half: bool, checkpointing: bool) -> Setup:
    numerics = Numerics(2 if half else 4, fused_norms=False)
    return Setup(machine("cpu"), 1, numerics, checkpointing=checkpointing, averaged=False)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_peak_of_the_tokenizers_steps(half: bool, checkpointing: bool) -> None:
    batch = 8
    config = dataclasses.replace(TOKENIZER, nested_dropout="none", null_dropout=0.0)
    model, latents = FlexTok(config), latents_of(config, batch)
    model.checkpoint_activations(checkpointing)
    draws = sample_draws(config, latents, torch.Generator().manual_seed(0))
    peak = peak_of_steps(model, lambda: flow_loss(model, latents, draws).loss.mean(), half)
    vae = VAEConfig(latent_channels=16, norm_num_groups=8, block_out_channels=(16,) * 4)
    net = dataclasses.replace(config, vae=vae)
    options = {"budget_groups": 1, "vae": None, "teacher": None}
    how = setup(half, checkpointing)
    planned = memory(tokenizer_workload(options, net, 128, "latents", how.numerics), how, batch)
    assert planned.total - planned.frozen == pytest.approx(peak, rel=0.15)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 64])
def test_peak_of_the_priors_steps(half: bool, checkpointing: bool, chunk: int | None) -> None:
    batch = 8
    model, tokens = Prior(PRIOR), torch.randint(PRIOR.vocab_size, (batch, PRIOR.num_tokens))
    model.checkpoint_activations(checkpointing)
    classes = torch.zeros(batch, dtype=torch.int64)
    loss = lambda: token_loss(model.hidden(tokens, classes), model.head.weight, tokens, chunk_size=chunk).loss  # noqa: E731
    peak, how = peak_of_steps(model, loss, half), setup(half, checkpointing)
    options = {"loss_chunk": chunk, "tokenizer": None, "text_encoder": None}
    planned = memory(prior_workload(options, PRIOR, 256, "tokens", how.numerics), how, batch)
    assert planned.total == pytest.approx(peak, rel=0.15)


def test_the_logits_are_most_of_an_unchunked_loss() -> None:
    whole, chunked = (token_loss_bytes(PRIOR, 64, chunk, Numerics()) for chunk in (None, 64))
    assert whole > 10 * chunked > 0


def test_peak_of_an_autoencoder_does_not_depend_on_the_device() -> None:
    config = VAEConfig(latent_channels=4, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8)
    model, images = VAE(config), torch.randn(1, 3, 32, 32)
    with PeakMemory() as seen:
        loss = nn.functional.l1_loss(model(images)[1], images)
    assert loss.requires_grad
    with torch.device("meta"):
        _, kept = vae_step(VAE(config), None, 32)
    assert kept == pytest.approx(seen.peak, rel=0.15)
