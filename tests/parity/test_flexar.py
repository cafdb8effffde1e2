"""The numbers of published priors, computed with their code, through the public API, with the cache and without it.

`golden/flexar_class_a` and `golden/flexar_text_a` were made with EPFL-VILAB/search-over-tokens at e7564c5 and
apple/ml-l3m at e6376a3 on CPU in float32 with random weights, as releases that their loader reads. Tolerances are those
that the spread between float32 and float64 of that code suggests.

The published loop makes class 0 of the null class after the first token; ours does not, so that with guidance its
tokens are the `greedy_truenull_*` of the class set (docs/differences.md).
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from flextok_pl.models.prior import Condition, Prior, TextStates
from flextok_pl.models.sampling import Sampling, filter_logits
from flextok_pl.models.text import TextEncoder
from flextok_pl.search.candidates import draw_candidates

pytestmark = pytest.mark.usefixtures("no_tf32")

GOLDEN = Path(__file__).parent / "golden"
LOGITS, GUIDED, PROBABILITIES = 3e-5, 1e-4, 1e-5
BRANCHES = 4  # continuations of each sequence in the golden data


class Golden(NamedTuple):
    """A release, its numbers and its conditions."""

    prior: Prior
    numbers: dict[str, Tensor]
    condition: Condition  # of the arrays with the condition
    greedy: Condition  # of those of greedy decoding and branches
    greedy_name: str  # of the arrays whose null condition stays null

    @property
    def scale(self) -> float:
        return float(self.numbers["cfg_factor"])

    @property
    def tokens(self) -> Tensor:
        return self.numbers["token_ids"]


@pytest.fixture(scope="module", params=["class", "text"])
def golden(request: pytest.FixtureRequest) -> Golden:
    folder = GOLDEN / f"flexar_{request.param}_a"
    prior = Prior.from_pretrained(folder)
    with np.load(folder / "golden.npz") as arrays:
        numbers = {name: torch.from_numpy(arrays[name]) for name in arrays.files if arrays[name].dtype.kind != "U"}
    if request.param == "class":
        labels = numbers["labels_cond"], numbers["labels_greedy"]
        return Golden(prior, numbers, *labels, greedy_name="greedy_truenull")
    states = TextStates(numbers["text_states_cond"], numbers["text_mask_cond"].bool())
    prior.set_null_text(numbers["text_states_null"][0][numbers["text_mask_null"][0].bool()])
    return Golden(prior, numbers, states, states, greedy_name="greedy_cfg")


def near(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours.to(theirs.dtype), theirs, rtol=0, atol=tolerance)


def guided(golden: Golden, tokens: Tensor, condition: Condition) -> Tensor:
    """Guided logits after tokens (B, k) by whole passes, without a cache: (B, V)."""
    padded = torch.cat([tokens, torch.zeros(len(tokens), 1, dtype=torch.int64)], 1)
    with torch.no_grad():
        own, free = golden.prior(padded, condition)[:, -1], golden.prior(padded)[:, -1]
    return free + golden.scale * (own - free)


def test_logits(golden: Golden) -> None:
    numbers, tokens = golden.numbers, golden.tokens
    with torch.no_grad():
        near(golden.prior(tokens, golden.condition), numbers["logits_tf_cond"], LOGITS)
        near(golden.prior(tokens), numbers["logits_tf_uncond"], LOGITS)
        if "logits_tf_class0" in numbers:
            near(golden.prior(tokens, torch.zeros(3, dtype=torch.int64)), numbers["logits_tf_class0"], LOGITS)


@pytest.mark.parametrize("length", [0, 1, 5])
@pytest.mark.parametrize("kind", ["cond", "uncond"])
def test_prefixes(golden: Golden, length: int, kind: str) -> None:
    """The last position by the state of a generation, token by token; all of them by a whole pass."""
    theirs = golden.numbers[f"logits_prefix{length}_{kind}"]
    condition = golden.condition if kind == "cond" else None
    with torch.no_grad():
        near(golden.prior(golden.tokens[:, : length + 1], condition), theirs, LOGITS)
    state = golden.prior.begin(condition, golden.tokens[:, :0])
    for position in range(length):
        near(state.logits(), theirs[:, position], LOGITS)
        state = state.branch(torch.arange(3), golden.tokens[:, position], 16)
    near(state.logits(), theirs[:, -1], LOGITS)
    near(golden.prior.begin(condition, golden.tokens[:, :length]).logits(), theirs[:, -1], LOGITS)


def test_guidance_and_what_is_drawn_from(golden: Golden) -> None:
    numbers, prefix = golden.numbers, golden.tokens[:, :5]
    cached = golden.prior.begin(golden.condition, prefix, golden.scale).logits()
    tables = {
        "t0.7_topk5": Sampling(0.7, 5),
        "t0.7_topp0.8": Sampling(0.7, None, 0.8),
        "t1_topp0.8": Sampling(1.0, None, 0.8),
        "t1_topk5_topp0.8": Sampling(1.0, 5, 0.8),
        "t1": Sampling(),
    }
    for logits in (cached, guided(golden, prefix, golden.condition)):
        near(logits, numbers["guided_prefix5"], GUIDED)
        for name, sampling in tables.items():
            table = filter_logits(logits, *sampling).softmax(-1)
            near(table, numbers[f"probs_prefix5_{name}"], PROBABILITIES)
            assert torch.equal(table > 0, numbers[f"probs_prefix5_{name}"] > 0)


def test_greedy_tokens(golden: Golden) -> None:
    numbers, prior = golden.numbers, golden.prior
    assert torch.equal(prior.generate(golden.greedy, temperature=0), numbers["greedy_nocfg_tokens"])
    tokens = prior.generate(golden.greedy, cfg_scale=golden.scale, temperature=0)
    assert torch.equal(tokens, numbers[f"{golden.greedy_name}_tokens"])
    for name, scale in ((golden.greedy_name, golden.scale), ("greedy_nocfg", 1.0)):
        log_probs = torch.zeros(3, dtype=torch.float64)
        state = prior.begin(golden.greedy, golden.tokens[:, :0], scale)
        state.extend(16, None, Sampling(0.0), log_probs)
        assert torch.equal(state.tokens, numbers[f"{name}_tokens"])
        near(log_probs[:, None], numbers[f"{name}_logprob"], GUIDED)
    for position in range(16):
        logits = guided(golden, tokens[:, :position], golden.greedy)
        near(logits, numbers[f"{golden.greedy_name}_guided_logits"][:, position], GUIDED)
        assert torch.equal(logits.argmax(-1), tokens[:, position])


def test_the_null_class_stays_null(golden: Golden) -> None:
    """Where the published loop departs, it is by the null half alone, from the second token on."""
    numbers = golden.numbers
    different = numbers["greedy_cfg_tokens"] != numbers[f"{golden.greedy_name}_tokens"]
    if golden.prior.config.text_width is not None:
        assert not different.any(), "the empty text stays what it is"
        return
    assert different.sum() == 25 and not different[:, 0].any()
    with torch.no_grad():
        null = golden.prior(numbers["greedy_cfg_tokens"])
        tench = golden.prior(numbers["greedy_cfg_tokens"], torch.zeros(3, dtype=torch.int64))
    near(null[:, 0], numbers["greedy_cfg_uncond_logits"][:, 0], LOGITS)
    near(tench[:, 1:], numbers["greedy_cfg_uncond_logits"][:, 1:], LOGITS)


@pytest.mark.parametrize("count", [1, 3])
def test_branches(golden: Golden, count: int) -> None:
    """The likeliest last tokens after the likeliest ones before, which search takes at temperature 0."""
    if count == 3 and golden.greedy_name != "greedy_cfg":
        return  # that of the classes has class 0 for null from its second step on
    numbers, state = golden.numbers, golden.prior.begin(golden.greedy, golden.tokens[:, :5], golden.scale)
    drawn = draw_candidates(state, count, torch.zeros(3, BRANCHES, 16), Sampling(0.0), last_only=True, distinct=True)
    theirs = numbers[f"branch{count}_tokens"]
    assert torch.equal(drawn.tokens, theirs)
    near(drawn.log_probs[:, None], numbers[f"branch{count}_logprob"], GUIDED)
    top = guided(golden, theirs[::BRANCHES, :-1], golden.greedy).topk(BRANCHES)
    assert torch.equal(top.indices.flatten(), theirs[:, -1])


def test_texts_under_their_encoder() -> None:
    folder = GOLDEN / "flexar_text_a"
    prior = Prior.from_pretrained(folder)
    assert prior.config.text_encoder == str(folder / "t5_tiny")
    with np.load(folder / "golden.npz") as arrays:
        numbers = dict(arrays)
    encoder = TextEncoder(prior.config.text_encoder)
    states, mask = encoder(list(numbers["prompts"]))
    assert torch.equal(mask, torch.from_numpy(numbers["text_mask_cond"]).bool())
    near(states[mask], torch.from_numpy(numbers["text_states_cond"])[mask], LOGITS)
    near(encoder.null_states(), torch.from_numpy(numbers["text_states_null"])[0, :1], LOGITS)
    prior.set_null_text(encoder.null_states())
    tokens = torch.from_numpy(numbers["token_ids"])
    with torch.no_grad():
        near(prior(tokens, TextStates(states, mask)), torch.from_numpy(numbers["logits_tf_cond"]), LOGITS)
        projected = prior.text_projection(states)
        near(projected[mask], torch.from_numpy(numbers["text_proj_cond"])[mask], LOGITS)
