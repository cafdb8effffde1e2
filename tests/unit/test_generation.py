"""Sequences that grow: branches of one cache, and the log-probabilities of what is drawn."""

from typing import Any

import pytest
import torch
from torch import Tensor

from flextok_pl.config import PriorConfig
from flextok_pl.models import generation
from flextok_pl.models import prior as prior_module
from flextok_pl.models.generation import uniform_numbers
from flextok_pl.models.prior import Prior, TextStates
from flextok_pl.models.sampling import GREEDY, Sampling, filter_logits

B, K, V, E = 3, 12, 40, 8
CONFIGS = {
    "class": PriorConfig(num_classes=5, vocab_size=V, num_tokens=K, depth=2, width=32, head_dim=16),
    "text": PriorConfig(
        num_classes=0, vocab_size=V, num_tokens=K, depth=2, width=32, head_dim=16, text_width=E, null_text_length=2
    ),
}
CONDITIONS = {
    "class": torch.tensor([0, 4, -1]),
    "text": TextStates(
        torch.randn(B, 6, E, generator=torch.Generator().manual_seed(1)),
        torch.arange(6) < torch.tensor([[1], [6], [3]]),
    ),
}


@pytest.fixture(params=CONFIGS)
def kind(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(kind: str) -> Prior:
    generator = torch.Generator().manual_seed(0)
    prior = Prior(CONFIGS[kind]).eval()
    for parameter in prior.parameters():
        parameter.data = 0.4 * torch.randn(parameter.shape, generator=generator)
    return prior


def chosen(condition: Any, rows: Tensor) -> Any:
    return condition[rows] if isinstance(condition, Tensor) else TextStates(*(part[rows] for part in condition))


@torch.no_grad()
def guided_logits(prior: Prior, tokens: Tensor, condition: Any, scale: float) -> Tensor:
    """By whole passes: (B, k, V), of which the row i predicts token i."""
    own, free = prior(tokens, condition), prior(tokens)
    return free + scale * (own - free)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("graph", [False, True])
def test_branches_share_what_was_run(kind: str, scale: float, graph: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prior_module, "can_capture", lambda model: graph)

    def repeat(step: Any, count: int, graph_device: torch.device | None) -> None:
        assert (graph_device is not None) == graph
        for _ in range(count):
            step()

    monkeypatch.setattr(generation, "repeat", repeat)
    prior, condition = build(kind), CONDITIONS[kind]
    uniform = uniform_numbers([torch.Generator().manual_seed(i) for i in range(B)], B, K, prior.device)
    state = prior.begin(condition, torch.tensor([[1, 2], [3, 4], [5, 6]]), scale, 8)
    state.extend(3, uniform, Sampling())
    before, positions = state.tokens.clone(), state.work.positions
    halves = 1 if scale == 1 else 2
    assert before.shape == (B, 5) and positions == halves * B * (3 + 2)
    rows, more = torch.tensor([2, 0, 2, 2]), torch.tensor([7, 8, 9, 7])
    branches = state.branch(rows, more, 9)
    assert torch.equal(branches.tokens, torch.cat([before[rows], more[:, None]], 1))
    assert branches.work is state.work and state.work.positions == positions + halves * B
    branches.extend(2, None, GREEDY)
    last = torch.cat([branches.tokens, torch.zeros(4, 1, dtype=torch.int64)], 1)
    expected = guided_logits(prior, last, chosen(condition, rows), scale)
    torch.testing.assert_close(branches.logits(), expected[:, -1], rtol=0, atol=2e-5)
    assert torch.equal(branches.tokens[:, 6:], expected[:, 6:8].argmax(-1))
    again = branches.branch(torch.tensor([3]), torch.tensor([0]), 12)
    again.extend(3, None, GREEDY)
    assert torch.equal(again.tokens[:, :9], last[3:4])
    expected = guided_logits(prior, again.tokens, chosen(condition, torch.tensor([2])), scale)
    assert torch.equal(again.tokens[:, 9:], expected[:, 9:].argmax(-1))
    state.extend(3, uniform, Sampling())
    drawn = prior.generate(
        condition, 8, scale, prefix=before[:, :2], generator=[torch.Generator().manual_seed(i) for i in range(B)]
    )
    assert torch.equal(state.tokens, drawn), "its branches leave a state as it was"


@pytest.mark.parametrize(
    "sampling", [Sampling(), Sampling(0.7), Sampling(1.0, 5), Sampling(1.2, None, 0.8), Sampling(0.7, 9, 0.8), GREEDY]
)
def test_log_probs_are_those_of_the_distribution(kind: str, sampling: Sampling) -> None:
    prior, condition = build(kind), CONDITIONS[kind]
    uniform = uniform_numbers(torch.Generator().manual_seed(0), B, K, prior.device)
    state, log_probs = prior.begin(condition, cfg_scale=2.0), torch.ones(B, dtype=torch.float64)
    state.extend(K, uniform, sampling, log_probs)
    logits = guided_logits(prior, state.tokens, condition, 2.0).flatten(0, 1)
    table = filter_logits(logits, *sampling).log_softmax(-1).gather(1, state.tokens.reshape(-1, 1)).view(B, K)
    assert table.isfinite().all()
    torch.testing.assert_close(log_probs - 1, table.double().sum(1), rtol=0, atol=1e-4)
    if sampling is GREEDY:
        assert (log_probs < 1 - 1e-3).all(), "of the distribution without a temperature"


def test_what_a_state_cannot_begin_with() -> None:
    prior = build("class")
    with pytest.raises(ValueError, match="prefix has all num_tokens=2 tokens"):
        prior.begin(torch.tensor([0]), torch.zeros(1, 2, dtype=torch.int64), num_tokens=2)
    with pytest.raises(ValueError, match="prefix has shape"):
        prior.begin(torch.tensor([0]), torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="num_tokens=13"):
        prior.begin(torch.tensor([0]), num_tokens=13)
    prior.head.weight.data[0, 0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        prior.begin(torch.tensor([0])).logits()
