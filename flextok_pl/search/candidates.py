"""Candidates: several continuations of each sequence of a beam, by numbers that belong to places and candidates.

What candidates have in common is run once, and no cache is copied for one of which only the last token is its own.

Shapes: W sequences of the beam, N candidates of each, C = W * N candidates, S sequences of a state, k tokens, V
vocabulary.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flextok_pl.keys import sample_generators
from flextok_pl.models.generation import uniform_numbers
from flextok_pl.models.sampling import Sampling, draw_distinct, draw_tokens, filter_logits, token_log_probs
from flextok_pl.precision import accumulation_dtype
from flextok_pl.search.priors import State


class Candidates(NamedTuple):
    """C sequences: those of a state, each with a last token of its own."""

    state: State
    rows: Tensor  # (C,) int64, sequences of the state
    last: Tensor  # (C,) int64
    log_probs: Tensor  # (C,) of all new tokens

    @property
    def tokens(self) -> Tensor:
        """(C, k) int64."""
        return torch.cat([self.state.tokens.index_select(0, self.rows), self.last[:, None]], 1)

    def branch(self, chosen: Tensor, most: int) -> State:
        """The state of some candidates, (N,) int64, with room for `most` tokens."""
        return self.state.branch(self.rows[chosen], self.last[chosen], most)


def candidate_keys(key: str, candidates: Sequence[int]) -> list[str]:
    """What seeds the draws of candidates of a prompt with this key; candidate 0 is what plain sampling gives."""
    return [f"{key}\0candidate {number}" if number else key for number in candidates]


def candidate_numbers(key: str, seed: int, count: int, length: int, device: torch.device) -> Tensor:
    """(C, K) uniform numbers in [0, 1), which decide the tokens of C candidates."""
    generators = sample_generators(candidate_keys(key, range(count)), seed, "tokens")
    return uniform_numbers(generators, count, length, device)


def draw_candidates(
    beam: State, count: int, uniform: Tensor, sampling: Sampling, last_only: bool, distinct: bool
) -> Candidates:
    """Continue each of W sequences by `count` tokens in N ways.

    Args:
        beam: W sequences; with `last_only` they are extended themselves.
        count: at least 1.
        uniform: (W, N, K) numbers of the candidates. Tokens that candidates have in common come from the first one's.
        sampling: how tokens are drawn. With temperature 0 the last tokens are the N most likely ones.
        last_only: candidates of a sequence differ in their last token only; else in all new ones.
        distinct: candidates that agree up to their last token draw that without replacement.

    Returns:
        C = W * N candidates, number w * N + j being number j of sequence w.
    """
    width, each, _ = uniform.shape
    numbers, first = uniform.flatten(0, 1), beam.tokens.shape[1]  # (C, K)
    log_probs = torch.zeros(width, dtype=accumulation_dtype(uniform.device), device=uniform.device)
    rows = torch.arange(width, device=uniform.device).repeat_interleave(each)
    state = beam
    if last_only or count == 1:
        if count > 1:
            state.extend(count - 1, uniform[:, 0], sampling, log_probs)
        log_probs = log_probs.repeat_interleave(each)
    else:
        filtered = filter_logits(state.logits(), *sampling)  # (W, V)
        tokens = draw_tokens(filtered, uniform[:, :, first])  # (W, N)
        log_probs = token_log_probs(filtered, tokens).flatten()
        state = state.branch(rows, tokens.flatten(), first + count)
        if count > 2:
            state.extend(count - 2, numbers, sampling, log_probs)
        rows = torch.arange(width * each, device=uniform.device)
    filtered = filter_logits(state.logits(), *sampling)  # (S, V)
    last = numbers[:, first + count - 1].reshape(len(filtered), -1)  # (S, C / S)
    drawn = _last_tokens(state, filtered, last, sampling, distinct)
    log_probs = log_probs + token_log_probs(filtered, drawn).flatten()
    return Candidates(state, rows, drawn.flatten(), log_probs)


def _last_tokens(state: State, filtered: Tensor, uniform: Tensor, sampling: Sampling, distinct: bool) -> Tensor:
    """Tokens (S, n) after S sequences with (S, V) logits, by (S, n) numbers."""
    if sampling.temperature == 0:
        each, vocabulary = uniform.shape[1], filtered.shape[1]
        likely = filtered.topk(min(each, vocabulary)).indices
        return likely[:, torch.arange(each, device=likely.device) % vocabulary]
    if not distinct:
        return draw_tokens(filtered, uniform)
    if uniform.shape[1] > 1:
        return draw_distinct(filtered, uniform)
    # Each candidate has a sequence of its own; those of equal ones take turns.
    drawn = draw_tokens(filtered, uniform)
    if len(drawn) == 1:
        return drawn
    _, group, sizes = torch.unique(state.tokens, dim=0, return_inverse=True, return_counts=True)
    for number in (sizes > 1).nonzero().flatten().tolist():
        members = (group == number).nonzero().flatten()
        drawn[members] = draw_distinct(filtered[members[:1]], uniform[members].T).T
    return drawn
