"""Candidates beside those that whole passes of the prior give, one by one and without a cache."""

from typing import Any

import pytest
import torch
from search_helpers import CONDITIONS, K, V, small_prior
from torch import Tensor

from flextok_pl.models.prior import Prior
from flextok_pl.models.sampling import GREEDY, Sampling, draw_tokens, filter_logits
from flextok_pl.search.candidates import candidate_keys, candidate_numbers, draw_candidates

SCALE = 2.0


@torch.no_grad()
def next_logits(prior: Prior, tokens: list[int], condition: Any) -> Tensor:
    """(1, V)."""
    given = torch.tensor([[*tokens, 0]])
    own, free = prior(given, condition)[:, -1], prior(given)[:, -1]
    return free + SCALE * (own - free)


def draw_one(logits: Tensor, number: Tensor, sampling: Sampling, taken: list[int]) -> tuple[int, float]:
    """A token that is not among those taken, and its log-probability where all may be taken."""
    filtered = filter_logits(logits, *sampling)
    left = filtered.clone()
    left[0, taken] = float("-inf")
    token = int(left.argmax() if sampling.temperature == 0 else draw_tokens(left, number.view(1, 1)))
    return token, float(filtered.double().log_softmax(-1)[0, token])


def slow_candidates(
    prior: Prior, beams: Tensor, count: int, numbers: Tensor, condition: Any, sampling: Sampling, last_only: bool,
    distinct: bool,
) -> tuple[list[list[int]], list[float]]:  # fmt: skip
    found, log_probs = [], []
    taken: dict[tuple[int, ...], list[int]] = {}
    for w, beam in enumerate(beams.tolist()):
        for j in range(numbers.shape[1]):
            tokens, total = list(beam), 0.0
            for i in range(len(beam), len(beam) + count):
                last = i == len(beam) + count - 1
                number = numbers[w, 0 if last_only and not last else j, i]
                gone = taken.setdefault(tuple(tokens), []) if last and distinct else []
                token, log_prob = draw_one(next_logits(prior, tokens, condition), number, sampling, gone)
                if last and distinct:
                    gone.append(token)
                tokens.append(token)
                total += log_prob
            found.append(tokens)
            log_probs.append(total)
    return found, log_probs


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("distinct", [False, True])
@pytest.mark.parametrize("sampling", [Sampling(0.9), Sampling(1.0, 6, 0.9), GREEDY])
def test_the_shared_cache_gives_what_none_gives(
    kind: str, count: int, last_only: bool, distinct: bool, sampling: Sampling
) -> None:
    if sampling is GREEDY and not (distinct and last_only):
        return
    prior, condition = small_prior(kind), CONDITIONS[kind]
    numbers = candidate_numbers("key", 0, 8, K, prior.device).view(2, 4, K)
    beams = torch.tensor([[3, 1, 4], [3, 1, 5]])
    two = (
        condition.expand(2)
        if kind == "class"
        else type(condition)(*(part.expand(2, *part.shape[1:]) for part in condition))
    )
    state = prior.begin(two, beams, SCALE)
    drawn = draw_candidates(state, count, numbers, sampling, last_only, distinct)
    tokens, log_probs = slow_candidates(prior, beams, count, numbers, condition, sampling, last_only, distinct)
    assert drawn.tokens.tolist() == tokens
    torch.testing.assert_close(drawn.log_probs, torch.tensor(log_probs, dtype=torch.float64), rtol=0, atol=1e-4)
    if distinct:
        assert len(drawn.tokens.unique(dim=0)) == 8
    kept = torch.tensor([6, 1, 6])
    state = drawn.branch(kept, K)
    assert torch.equal(state.tokens, drawn.tokens[kept])
    expected = torch.cat([next_logits(prior, row, condition) for row in state.tokens.tolist()])
    torch.testing.assert_close(state.logits(), expected, rtol=0, atol=2e-5)


@pytest.mark.parametrize("at_once", [1, 5, 256])
def test_equal_sequences_take_turns(at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two tokens each: with few tokens left, several candidates have the same first one."""
    monkeypatch.setattr("flextok_pl.search.candidates.ROWS", at_once)
    prior = small_prior()
    numbers = candidate_numbers("key", 0, 12, K, prior.device).view(1, 12, K)
    sampling = Sampling(1.0, 8)
    free, distinct = (
        draw_candidates(prior.begin(torch.tensor([2])), 2, numbers, sampling, False, each) for each in (False, True)
    )
    assert len(free.tokens.unique(dim=0)) < 12 and len(distinct.tokens.unique(dim=0)) == 12
    assert torch.equal(free.tokens[:, 0], distinct.tokens[:, 0])
    assert len(distinct.tokens[:, 0].unique()) < 8


@pytest.mark.parametrize(("last_only", "copies"), [(True, 0), (False, 1)])
def test_no_cache_is_copied_for_a_last_token(last_only: bool, copies: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from flextok_pl.layers.causal import KeyValueCache

    copied: list[int] = []
    select = KeyValueCache.select

    def spy(cache: KeyValueCache, rows: Tensor, length: int) -> KeyValueCache:
        copied.append(len(rows))
        return select(cache, rows, length)

    monkeypatch.setattr(KeyValueCache, "select", spy)
    prior = small_prior()
    numbers = candidate_numbers("key", 0, 10, K, prior.device).view(2, 5, K)
    state = prior.begin(torch.tensor([2, 2]), torch.tensor([[1], [2]]), SCALE)
    before = state.work.positions
    drawn = draw_candidates(state, 4, numbers, Sampling(), last_only, True)
    assert copied == [20] * (copies * prior.config.depth)
    assert state.work.positions - before == 2 * 3 * (2 if last_only else 10)
    drawn.branch(torch.tensor([0, 7]), K)
    assert copied[-1] == 4


def test_the_first_candidate_is_the_plain_sample() -> None:
    from flextok_pl.keys import sample_generators
    from flextok_pl.models.generation import uniform_numbers

    numbers = candidate_numbers("key", 5, 4, K, torch.device("cpu"))
    assert torch.equal(numbers[:1], uniform_numbers(sample_generators(["key"], 5, "tokens"), 1, K, torch.device("cpu")))
    assert torch.equal(numbers[:2], candidate_numbers("key", 5, 2, K, torch.device("cpu")))
    assert len(numbers.unique(dim=0)) == 4
    assert candidate_keys("key", [0, 7])[0] == "key" and len({*candidate_keys("a", [0, 1, 2])}) == 3
    assert int((numbers * V).long().max()) < V
