"""Operations from configurations against torch's count of real steps."""

import dataclasses

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from flextok_pl.config import FlexTokConfig, PriorConfig
from flextok_pl.cost.flops import (
    budget_groups,
    decoder_flops,
    encoder_flops,
    prior_flops,
    projection_flops,
    tokenizer_flops,
)
from flextok_pl.flow.nested_dropout import BUDGET_LAWS, budget_probabilities, sample_num_tokens
from flextok_pl.models.objective import TrainingDraws, flow_loss, sample_draws
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.teacher import ProjectionHead
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok

CONFIG = dataclasses.replace(
    FlexTokConfig.preset("tiny"), vae=None, encoder_width=32, decoder_width=64, decoder_depth=3, grid_size=(4, 4)
)
LATENTS = (12, 8, 8)
PATCHES = 16


def counted(forward) -> tuple[int, int]:
    """(forward, backward); attention as plain products, since the count of fused kernels includes what they repeat."""
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = forward()
        first = counter.get_total_flops()
        loss.backward()
    return first, counter.get_total_flops() - first


def tokenizer_step(model: FlexTok, draws: TrainingDraws, groups: int = 1) -> tuple[int, int]:
    latents = torch.randn(draws.noise.shape)
    return counted(lambda: flow_loss(model, latents, draws, budget_groups=groups).loss.mean())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kept", [1, 5, 16])
@pytest.mark.parametrize("options", [{}, {"causal_registers": False}, {"layout": "grid"}])
def test_tokenizer_is_exact(options: dict[str, object], kept: int, checkpointing: bool) -> None:
    batch = 3
    config = dataclasses.replace(CONFIG, **options)
    model = FlexTok(config)
    model.checkpoint_activations(checkpointing)
    budgets = torch.tensor([1, 1, kept])
    nowhere = torch.zeros(batch, dtype=torch.bool)
    draws = TrainingDraws(torch.randn(batch, *LATENTS), torch.rand(batch), budgets, nowhere)
    planned = (encoder_flops(config, kept, PATCHES) + decoder_flops(config, kept, PATCHES)) * batch
    repeated = planned.recomputed if checkpointing else 0
    assert tokenizer_step(model, draws) == (planned.forward, planned.backward + repeated)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk", [None, 7])
@pytest.mark.parametrize("text", [0, 5])
def test_prior_is_exact(text: int, chunk: int | None, checkpointing: bool) -> None:
    batch = 2
    condition = {"text_width": 24} if text else {"num_classes": 3}
    config = PriorConfig(**condition, vocab_size=100, num_tokens=10, depth=3, width=64, head_dim=16)
    model, tokens = Prior(config), torch.randint(100, (batch, 10))
    model.checkpoint_activations(checkpointing)
    given = TextStates(torch.randn(batch, text, 24), torch.ones(batch, text, dtype=torch.bool))
    classes = torch.zeros(batch, dtype=torch.int64)

    def loss():
        hidden = model.hidden(tokens, given if text else classes)
        return token_loss(hidden, model.head.weight, tokens, chunk_size=chunk).loss

    planned = prior_flops(config, text) * batch
    # A chunked loss makes its gradients in the forward pass: only the sum is comparable.
    assert sum(counted(loss)) == planned.training + (planned.recomputed if checkpointing else 0)


def test_projection_is_exact() -> None:
    head, features = ProjectionHead(64, 120), torch.randn(2, PATCHES, 64, requires_grad=True)
    planned = projection_flops(64, 2048, 120, PATCHES) * 2
    assert counted(lambda: head(features).sum()) == (planned.forward, planned.backward)


@pytest.mark.parametrize("law", BUDGET_LAWS)
@pytest.mark.parametrize("num_registers", [16, 12])
def test_probabilities_are_those_of_the_draws(law: str, num_registers: int) -> None:
    draws = sample_num_tokens(law, 40_000, num_registers, torch.Generator().manual_seed(0))
    observed = draws.bincount(minlength=num_registers + 1) / len(draws)
    planned = budget_probabilities(law, num_registers)
    assert planned.sum() == pytest.approx(1.0)
    assert (observed - planned).abs().max() < 0.01


def test_unknown_law() -> None:
    with pytest.raises(ValueError, match="nested_dropout='half' is unknown"):
        budget_probabilities("half", 8)


@pytest.mark.parametrize("law", ["uniform", "pow2"])
@pytest.mark.parametrize("groups", [1, 3])
def test_longest_budgets_of_a_sorted_batch(law: str, groups: int) -> None:
    config, batch, steps = dataclasses.replace(CONFIG, nested_dropout=law, null_dropout=0.2), 7, 4000
    generator = torch.Generator().manual_seed(0)
    kept = sample_num_tokens(law, batch * steps, config.num_registers, generator)
    kept[torch.rand(len(kept), generator=generator) < config.null_dropout] = 0
    parts = kept.view(steps, batch).sort(dim=1).values.chunk(groups, dim=1)
    planned = budget_groups(config, batch, groups)
    assert [group.size for group in planned] == [part.shape[1] for part in parts]
    registers = torch.arange(config.num_registers + 1, dtype=torch.float64)
    for group, part in zip(planned, parts, strict=True):
        assert group.longest.sum() == pytest.approx(1.0)
        observed = part[:, -1].clamp(min=1).double().mean().item()
        assert float(group.longest @ registers) == pytest.approx(observed, rel=0.02)


@pytest.mark.parametrize("groups", [1, 3])
def test_expectation_is_the_mean_of_real_steps(groups: int) -> None:
    batch, steps = 8, 25
    config = dataclasses.replace(CONFIG, nested_dropout="uniform", null_dropout=0.2)
    model, latents, generator = FlexTok(config), torch.randn(batch, *LATENTS), torch.Generator().manual_seed(0)
    total = sum(sum(tokenizer_step(model, sample_draws(config, latents, generator), groups)) for _ in range(steps))
    planned = tokenizer_flops(config, batch, groups)
    assert planned.training == pytest.approx(total / steps / batch, rel=0.03)


def test_groups_and_short_budgets_cost_less() -> None:
    costs = [tokenizer_flops(CONFIG, 64, groups).training for groups in (1, 2, 4)]
    assert costs == sorted(costs, reverse=True)
    alone = dataclasses.replace(CONFIG, nested_dropout="none", null_dropout=0.0)
    assert tokenizer_flops(alone, 64, 4).training == pytest.approx(tokenizer_flops(alone).training)
    assert tokenizer_flops(alone).training > costs[0]


def test_prior_agrees_with_six_operations_per_weight() -> None:
    config = PriorConfig.preset("49m")  # PaLM's formula, https://arxiv.org/abs/2204.02311, appendix B
    weights = config.depth * (4 * config.width**2 + 3 * config.width * 1706) + config.width * config.vocab_size
    palm = config.num_tokens * (6 * weights + 12 * config.depth * config.width * config.num_tokens)
    assert prior_flops(config).training == palm
