"""Searches: that they sample, go on, find what is best, and are the same however they run."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from pretended_device import DEVICE, pretended_device
from search_helpers import (
    CONDITIONS,
    PROMPT,
    Alike,
    K,
    Likelihood,
    Red,
    Sum,
    V,
    options,
    small_prior,
    small_tokenizer,
)
from torch import Tensor

from flextok_pl.evaluation.decoding import decode
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.flow.decoding import Decoding
from flextok_pl.keys import sample_generators
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.algorithms import ALGORITHMS, beam_search, best_of_n, lookahead_search
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.priors import UniformPrior
from flextok_pl.search.results import Cost, SearchResult, Step
from flextok_pl.search.scoring import decode_tokens, decoder_calls
from flextok_pl.search.verifier import Context, Verifier

UNIFORM = UniformPrior(V, K)


@pytest.fixture(scope="module")
def tokenizer() -> FlexTok:
    return small_tokenizer()


def search(
    algorithm: str,
    tokenizer: FlexTok,
    verifier: Verifier,
    given: SearchOptions,
    kind: str = "class",
    prior: Any = None,
    **more: Any,
) -> SearchResult:
    condition = None if isinstance(prior, UniformPrior) else CONDITIONS[kind]
    return ALGORITHMS[algorithm](prior or small_prior(kind), tokenizer, verifier, PROMPT, condition, given, **more)


def plain_sample(kind: str, given: SearchOptions, num_tokens: int = K) -> Tensor:
    generators = sample_generators([PROMPT.key], given.seed, "tokens")
    scale, (temperature, top_k, top_p) = given.cfg_scale, given.sampling
    return small_prior(kind).generate(
        CONDITIONS[kind], num_tokens, scale, temperature, top_k, top_p, generator=generators
    )


def assert_same(one: SearchResult, other: SearchResult, atol: float = 1e-5) -> None:
    assert torch.equal(one.tokens, other.tokens) and torch.equal(one.candidates, other.candidates)
    torch.testing.assert_close(one.scores, other.scores, rtol=0, atol=atol)
    torch.testing.assert_close(one.log_probs, other.log_probs, rtol=0, atol=1e-5)
    for first, second in zip(one.steps, other.steps, strict=True):
        assert torch.equal(first.tokens, second.tokens) and torch.equal(first.parents, second.parents)
        assert first.cost == second.cost
    assert one.cost == other.cost


@pytest.mark.parametrize("kind", ["class", "text"])
@pytest.mark.parametrize("algorithm", ["best_of_n", "beam"])
@pytest.mark.parametrize("schedule", ["geometric", "linear"])
@pytest.mark.parametrize("branch", ["all", "last"])
def test_one_candidate_is_a_sample(kind: str, algorithm: str, schedule: Any, branch: Any, tokenizer: FlexTok) -> None:
    given = options(
        num_candidates=1, beam_width=1, schedule=schedule, tokens_per_step=3, branch=branch, top_k=20, seed=3
    )
    red = Red()
    found = search(algorithm, tokenizer, red, given, kind)
    tokens = plain_sample(kind, given)
    assert torch.equal(found.tokens, tokens)
    ((_, images),) = decode(tokenizer, tokens, [K], given.decoding, [PROMPT.key], given.seed)
    assert torch.equal(decode_tokens(tokenizer, found.tokens, PROMPT, given), images)
    means = images.double().mean((2, 3))
    assert found.scores.item() == pytest.approx((means[:, 0] - means[:, 1:].mean(1)).item())


@pytest.mark.parametrize("branch", ["all", "last"])
def test_the_first_candidates_are_samples(branch: Any, tokenizer: FlexTok) -> None:
    """A verifier that cannot tell candidates apart keeps the first ones."""
    given = options(num_candidates=4, branch=branch, distinct=False)
    for algorithm in ("best_of_n", "beam"):
        found = search(algorithm, tokenizer, Alike(), given)
        assert torch.equal(found.tokens, plain_sample("class", given)) and found.candidates.tolist() == [0]
        assert found.steps[-1].candidates.tolist() == [0, 1]


@pytest.mark.parametrize("max_tokens", [5, None])
def test_best_of_n_takes_the_best_sample(max_tokens: int | None, tokenizer: FlexTok) -> None:
    given = options(num_candidates=6, max_tokens=max_tokens, num_results=6, decode_batch_size=4)
    prior, length = small_prior(), max_tokens or K
    generators = [
        sample_generators([key], given.seed, "tokens")[0]
        for key in (PROMPT.key, *(f"{PROMPT.key}\0candidate {c}" for c in range(1, 6)))
    ]
    tokens = prior.generate(torch.tensor([2] * 6), length, given.cfg_scale, generator=generators)
    found = search("best_of_n", tokenizer, Sum(), given)
    order = tokens.sum(1).sort(descending=True, stable=True).indices
    assert torch.equal(found.tokens, tokens[order]) and torch.equal(found.candidates, order)
    assert found.scores.tolist() == tokens[order].sum(1).tolist()
    assert (found.steps[0].num_tokens, len(found.steps)) == (length, 1)


def test_a_beam_finds_the_best_sequence(tokenizer: FlexTok) -> None:
    """With all tokens as candidates at each step, where the best prefix begins the best sequence."""
    given = SearchOptions(num_candidates=V, beam_width=1, schedule="linear", tokens_per_step=1, max_tokens=4)
    for prior in (None, UNIFORM):
        found = search("beam", tokenizer, Sum(), given, prior=prior)
        assert found.tokens.tolist() == [[V - 1] * 4] and found.scores.tolist() == [4 * (V - 1)]


@pytest.mark.parametrize("branch", ["all", "last"])
@pytest.mark.parametrize("verifier", [Sum(), Likelihood(), Red()], ids=lambda each: each.name)
@pytest.mark.parametrize("algorithm", ["beam", "lookahead"])
def test_each_step_keeps_the_best_of_the_pool(branch: Any, verifier: Any, algorithm: str, tokenizer: FlexTok) -> None:
    """What is kept, with parents and log-probabilities, beside the prior's own passes."""
    given = options(branch=branch, num_candidates=5, beam_width=3, schedule=[2, 3, 7], lookahead=4)
    prior, seen = small_prior(), []
    kept = verifier.score

    def score(images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        scores = kept(images, prompts, context)
        seen.append((context, scores))
        return scores

    watched = replace(verifier) if not isinstance(verifier, Red) else Red()
    object.__setattr__(watched, "score", score)
    found = search(algorithm, tokenizer, watched, given, prior=prior)
    assert [len(context.tokens) for context, _ in seen] == [5, 15, 15]
    before = torch.zeros(1, 0, dtype=torch.int64)
    for (context, scores), step in zip(seen, found.steps, strict=True):
        best = scores.sort(descending=True, stable=True).indices[:3]
        assert torch.equal(step.candidates, best) and torch.equal(step.tokens, context.tokens[best])
        assert torch.equal(context.tokens[:, : before.shape[1]], before.repeat_interleave(5, 0))
        assert step.parents.tolist() == ([-1] * 3 if not before.numel() else (best // 5).tolist())
        with torch.no_grad():
            own, free = prior(context.tokens, torch.tensor([2] * len(scores))), prior(context.tokens)
        scale = 1 + 2 * torch.arange(step.num_tokens)[:, None] / (K - 1)
        table = (free + scale * (own - free)).double().log_softmax(-1)
        log_probs = table.gather(2, context.tokens[..., None])[..., 0]
        torch.testing.assert_close(context.log_probs, log_probs.sum(1), rtol=0, atol=1e-4)
        torch.testing.assert_close(context.last_log_probs, log_probs[:, before.shape[1] :].sum(1), rtol=0, atol=1e-4)
        assert torch.equal(step.log_probs, context.log_probs[best])
        if branch == "last":
            groups = context.tokens.view(-1, 5, step.num_tokens)
            assert (groups[:, :, :-1] == groups[:, :1, :-1]).all()
        assert all(len(group.unique(dim=0)) == 5 for group in context.tokens.view(-1, 5, step.num_tokens))
        before = step.tokens


def test_lookahead_judges_longer_sequences(tokenizer: FlexTok, monkeypatch: pytest.MonkeyPatch) -> None:
    given = options(lookahead=4, schedule=[2, 7, 14], decode_batch_size=4, num_candidates=5)
    seen: list[Tensor] = []
    module = "flextok_pl.search.scoring.decode_tokens"

    def spy(tokenizer: FlexTok, tokens: Tensor, *arguments: Any) -> Tensor:
        seen.append(tokens)
        return decode_tokens(tokenizer, tokens, *arguments)

    monkeypatch.setattr(module, spy)
    found = search("lookahead", tokenizer, Red(), given)
    assert [tuple(tokens.shape) for tokens in seen] == [(5, 6), (10, 11), (10, 16)]
    prior = small_prior()
    for tokens, count in zip(seen, (2, 7, 14), strict=True):
        rows = torch.tensor([2] * len(tokens))
        greedy = prior.generate(rows, tokens.shape[1], given.cfg_scale, 0.0, prefix=tokens[:, :count])
        assert torch.equal(tokens, greedy)
    last = found.steps[-1]
    assert torch.equal(found.tokens, seen[-1][last.candidates[:1]]) and found.tokens.shape == (1, 16)
    assert torch.equal(found.scores, last.scores[:1]) and torch.equal(found.log_probs, last.log_probs[:1])


def test_results_are_completed(tokenizer: FlexTok) -> None:
    given = options(schedule=[1, 4], num_results=2, complete=True)
    for verifier in (Sum(), Red(), Likelihood()):
        found = search("beam", tokenizer, verifier, given)
        greedy = small_prior().generate(
            torch.tensor([2, 2]), K, given.cfg_scale, 0.0, prefix=found.steps[-1].tokens[:2]
        )
        order = [row.tolist() for row in greedy]
        assert sorted(found.tokens.tolist()) == sorted(order)
        assert found.scores[0] >= found.scores[1]
        if isinstance(verifier, Sum):
            assert found.scores.tolist() == found.tokens.sum(1).tolist()
        if isinstance(verifier, Likelihood):
            torch.testing.assert_close(found.scores, found.log_probs / K)


@pytest.mark.parametrize("branch", ["all", "last"])
@pytest.mark.parametrize("algorithm", ["best_of_n", "beam", "lookahead"])
def test_how_many_are_decoded_at_once_changes_nothing(branch: Any, algorithm: str, tokenizer: FlexTok) -> None:
    given = options(branch=branch, schedule=[1, 3, 8], num_candidates=5, num_results=3, lookahead=3)
    found = search(algorithm, tokenizer, Red(), given, "text")
    for size in (1, 4):
        assert_same(search(algorithm, tokenizer, Red(), replace(given, decode_batch_size=size), "text"), found)


@pytest.mark.parametrize("algorithm", ["best_of_n", "beam", "lookahead"])
@pytest.mark.parametrize("branch", ["all", "last"])
@pytest.mark.parametrize("complete", [False, True])
def test_going_on_from_a_step(algorithm: str, branch: Any, complete: bool, tokenizer: FlexTok) -> None:
    given = options(branch=branch, schedule=[1, 3, 8], num_results=4, lookahead=3, complete=complete)
    given = replace(given, num_candidates=5) if algorithm == "best_of_n" else given
    steps: list[Step] = []

    def progress(step: Step, image: Tensor | None, cost: Cost) -> None:
        assert image is not None and image.shape == (3, 32, 32) and cost == step.cost
        steps.append(step)

    found = search(algorithm, tokenizer, Red(), given, progress=progress)
    assert len(steps) == (1 if algorithm == "best_of_n" else 3)
    assert all(first is second for first, second in zip(steps, found.steps, strict=True))
    for place, step in enumerate(steps):
        again = search(algorithm, tokenizer, Red(), given, start=step)
        assert_same(again._replace(steps=steps[:place] + again.steps), found)


@pytest.mark.parametrize("verifier", [Likelihood(), Sum()])
def test_going_on_from_a_step_with_a_uniform_prior(verifier: Any, tokenizer: FlexTok) -> None:
    given = options(schedule=[1, 2, 6])
    found = search("beam", tokenizer, verifier, given, prior=UNIFORM)
    assert found.cost.prior_positions == 0
    again = search("beam", tokenizer, verifier, given, prior=UNIFORM, start=found.steps[0])
    assert_same(again, found)
    torch.testing.assert_close(found.log_probs, -6 * torch.tensor([float(V)], dtype=torch.float64).log())
    if isinstance(verifier, Likelihood):
        assert found.steps[-1].candidates.tolist() == [0, 1], "all are as likely as each other"
    numbers = torch.rand(K, generator=sample_generators([PROMPT.key], 0, "tokens")[0], dtype=torch.float64)
    one = options(num_candidates=1, beam_width=1, cfg_scale=1.0)
    assert search("beam", tokenizer, Alike(), one, prior=UNIFORM).tokens.tolist() == [(numbers * V).long().tolist()]


def test_the_same_noise_for_all_candidates(tokenizer: FlexTok) -> None:
    tokens = torch.tensor([[1, 2, 3]] * 3)
    for vary, equal in ((False, True), (True, False)):
        given = options(algorithm="best_of_n", vary_noise=vary)
        images = decode_tokens(tokenizer, tokens, PROMPT, given, [0, 4, 5])
        assert torch.equal(images[0], images[1]) == torch.equal(images[1], images[2]) == equal
        assert torch.equal(images[0], decode_tokens(tokenizer, tokens[:1], PROMPT, given)[0])
    given = options(algorithm="best_of_n", vary_noise=True, num_candidates=5, num_results=5, decode_batch_size=2)
    found = search("best_of_n", tokenizer, Red(), given)
    images = decode_tokens(tokenizer, found.tokens, PROMPT, given, found.candidates.tolist())
    assert torch.equal(Red().score(images, [PROMPT] * 5, Context(found.tokens)), found.scores)


@pytest.mark.parametrize(
    ("decoding", "calls"),
    [
        (Decoding(num_steps=5), 10),
        (Decoding(num_steps=5, guidance="none"), 5),
        (Decoding(num_steps=5, guidance="cfg", guidance_scale=1.0), 5),
        (Decoding(num_steps=5, guidance="cfg", guidance_scale=lambda t: 2.0 if t > 0.5 else 1.0), 8),
        (Decoding(num_steps=5, solver="heun"), 18),
    ],
)
def test_decoder_calls(decoding: Decoding, calls: int) -> None:
    assert decoder_calls(decoding, "flow") == calls and decoder_calls(decoding, "mse") == 1


def test_costs_are_counted(tokenizer: FlexTok) -> None:
    """In steps of 1, 2 and 5 new tokens, with guidance; the newest token is run when one follows."""
    given = options(schedule=[1, 3, 8], num_candidates=3, beam_width=2, branch="all")
    last = replace(given, branch="last")
    positions = {"all": [1, 1 + 2 + 6, 9 + 2 + 4 * 6], "last": [1, 1 + 2 * 2, 5 + 2 * 5]}
    for each in (given, last):
        red = Red()
        found = search("beam", tokenizer, red, each)
        assert [step.cost.prior_positions for step in found.steps] == [2 * count for count in positions[each.branch]]
        assert red.pools == [3, 6, 6]
        assert found.cost == found.steps[-1].cost == Cost(2 * positions[each.branch][-1], 15 * 4, 15, 15)
        blind = search("beam", tokenizer, Likelihood(), each)
        assert blind.cost.decoded_images == blind.cost.decoder_calls == 0
    unguided = search("beam", tokenizer, Sum(), replace(given, cfg_scale=1.0))
    assert unguided.cost == Cost(positions["all"][-1], 0, 0, 15)
    assert search("best_of_n", tokenizer, Sum(), replace(given, cfg_scale=1.0)).cost == Cost(1 + 3 * 7, 0, 0, 3)


class Broken(Sum):
    """Fails at the third step."""

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        if context.tokens.shape[1] > 2:
            raise RuntimeError("out of order")
        return super().score(images, prompts, context)


def test_a_verifier_that_fails_ends_the_search(tokenizer: FlexTok) -> None:
    steps: list[Step] = []
    with pytest.raises(RuntimeError, match="out of order"):
        search("beam", tokenizer, Broken(), options(), progress=lambda step, *_: steps.append(step))
    assert [step.num_tokens for step in steps] == [1, 2]


@pytest.mark.parametrize(
    ("scores", "message"),
    [
        (lambda count: torch.full((count,), float("nan")), "verifier='sum' gives NaN as a score of the prompt 'apple'"),
        (lambda count: torch.zeros(count, 1), r"gives a tensor \(3, 1\), not a tensor \(3,\) of scores"),
        (lambda count: [0.0] * count, "gives list"),
    ],
)
def test_scores_that_are_none(scores: Callable[[int], Any], message: str, tokenizer: FlexTok) -> None:
    class Odd(Sum):
        def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Any:
            return scores(len(prompts))

    with pytest.raises(ValueError, match=message):
        search("beam", tokenizer, Odd(), options())


def test_what_does_not_fit(tokenizer: FlexTok) -> None:
    prior, given = small_prior(), options(schedule=[2, 4])
    for bad, message in (
        (replace(given, num_results=7), "num_results=7, but the last step has 6 candidates"),
        (replace(given, schedule=[2, 40]), "schedule="),
        (replace(given, max_tokens=40), "max_tokens=40"),
    ):
        with pytest.raises(ValueError, match=message):
            search("beam", tokenizer, Sum(), bad)
    with pytest.raises(ValueError, match="temperature=0 makes all num_candidates=3 samples equal"):
        search("best_of_n", tokenizer, Sum(), replace(given, temperature=0.0))
    with pytest.raises(ValueError, match="one prompt at a time"):
        beam_search(prior, tokenizer, Sum(), PROMPT, torch.tensor([0, 1]), given)
    step = search("beam", tokenizer, Sum(), given).steps[0]
    for other in (replace(given, beam_width=3), replace(given, schedule=[1, 3, 4])):
        with pytest.raises(ValueError, match="start holds 2 sequences of 2 tokens"):
            search("beam", tokenizer, Sum(), other, start=step)
    for option, value in (("temperature", 0.0), ("top_k", 3), ("top_p", 0.5), ("complete", True)):
        with pytest.raises(ValueError, match=f"{option}={value}: a uniform prior makes all tokens equally likely"):
            search("beam", tokenizer, Sum(), replace(given, **{option: value}), prior=UNIFORM)
    with pytest.raises(ValueError, match="lookahead=8: a uniform prior"):
        lookahead_search(UNIFORM, tokenizer, Sum(), PROMPT, None, given)
    assert best_of_n(UNIFORM, tokenizer, Sum(), PROMPT, None, given).tokens.shape == (1, 4)


@pytest.mark.parametrize("algorithm", ["best_of_n", "beam", "lookahead"])
@pytest.mark.parametrize("branch", ["all", "last"])
def test_on_another_device(algorithm: str, branch: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing meets what is elsewhere, and the steps for a graph give the same."""

    def repeat(step: Callable[[], None], count: int, graph_device: torch.device | None) -> None:
        assert graph_device == DEVICE
        for _ in range(count):
            step()

    given = options(branch=branch, schedule=[1, 3, 8], lookahead=3, complete=algorithm == "beam", num_candidates=4)
    expected = search(algorithm, small_tokenizer(), Red(), given)
    with pretended_device(monkeypatch):
        monkeypatch.setattr("flextok_pl.models.prior.can_capture", lambda model: True)
        monkeypatch.setattr("flextok_pl.models.generation.repeat", repeat)
        prior, tokenizer = small_prior().to(DEVICE), small_tokenizer().to(DEVICE)
        found = search(algorithm, tokenizer, Red(), given, prior=prior)
        again = search(algorithm, tokenizer, Red(), given, prior=prior, start=found.steps[0])
        uniform = UniformPrior(V, K, DEVICE)
        simple = replace(given, complete=False)
        if algorithm == "beam":
            alike = search(algorithm, tokenizer, Red(), simple, prior=uniform)
            assert_same(alike, search(algorithm, small_tokenizer(), Red(), simple, prior=UNIFORM), atol=0.01)
    assert_same(found, expected, atol=0.01)  # of scores of images whose pixels were rounded
    assert_same(again, expected, atol=0.01)
    assert all(part.device.type == "cpu" for part in (*found[:4], *found.steps[0][1:6]))
