"""Draw candidates: several continuations of each sequence of a beam, with numbers fixed by position and candidate.

The tokens that candidates share are computed once, and no cache is copied for a candidate whose only own token is its
last one.

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

ROWS = 256
"""Distributions from which tokens are drawn at once; bounds the memory for large pools."""


class Candidates(NamedTuple):
    """C sequences: those of a state, each with its own last token."""

    state: State
    rows: Tensor  # (C,) int64, sequences of the state
    last: Tensor  # (C,) int64
    log_probs: Tensor  # (C,), summed over all new tokens

    @property
    def tokens(self) -> Tensor:
        """(C, k) int64."""
        return torch.cat([self.state.tokens.index_select(0, self.rows), self.last[:, None]], 1)

    def branch(self, chosen: Tensor, most: int) -> State:
        """Make the state of some candidates, (N,) int64, with room for `most` tokens."""
        return self.state.branch(self.rows[chosen], self.last[chosen], most)


def candidate_keys(key: str, candidates: Sequence[int]) -> list[str]:
    """Seeds of the draws of candidates of a prompt with this key; candidate 0 is the plain sample."""
    return [f"{key}\0candidate {number}" if number else key for number in candidates]


def candidate_numbers(key: str, seed: int, count: int, length: int, device: torch.device) -> Tensor:
    """(C, K) uniform numbers in [0, 1) that decide the tokens of C candidates."""
    generators = sample_generators(candidate_keys(key, range(count)), seed, "tokens")
    return uniform_numbers(generators, count, length, device)


def draw_candidates(
    beam: State, count: int, uniform: Tensor, sampling: Sampling, last_only: bool, distinct: bool
) -> Candidates:
    """Continue each of W sequences by `count` tokens in N ways.

    Args:
        beam: W sequences; with `last_only` they are extended in place.
        count: at least 1.
        uniform: (W, N, K) numbers of the candidates. Shared tokens use those of the first candidate.
        sampling: how to draw tokens. Temperature 0 takes the N most likely ones as last tokens.
        last_only: candidates of a sequence differ in their last token only, otherwise in all new ones.
        distinct: candidates that differ only in their last token draw it without replacement.

    Returns:
        C = W * N candidates; number w * N + j is number j of sequence w.
    """
    width, each, _ = uniform.shape
    numbers, first = uniform.flatten(0, 1), beam.tokens.shape[1]  # (C, K)
    log_probs = torch.zeros(width, dtype=accumulation_dtype(uniform.device), device=uniform.device)
    rows = torch.arange(width, device=uniform.device).repeat_interleave(each)
    state, shared = beam, last_only or count == 1  # all but the last token
    if shared:
        if count > 1:
            state.extend(count - 1, uniform[:, 0], sampling, log_probs)
        log_probs = log_probs.repeat_interleave(each)
    else:
        tokens, drawn_log_probs = _draw(state.logits(), uniform[:, :, first], sampling, False)  # (W, N)
        log_probs = drawn_log_probs.flatten()
        state = state.branch(rows, tokens.flatten(), first + count)
        if count > 2:
            state.extend(count - 2, numbers, sampling, log_probs)
        rows = torch.arange(width * each, device=uniform.device)
    last_numbers = numbers[:, first + count - 1].reshape(-1, each if shared else 1)  # (S, C / S)
    last, last_log_probs = _last_tokens(state, last_numbers, sampling, distinct)
    return Candidates(state, rows, last.flatten(), log_probs + last_log_probs.flatten())


def _last_tokens(state: State, uniform: Tensor, sampling: Sampling, distinct: bool) -> tuple[Tensor, Tensor]:
    """Tokens (S, n) after S sequences and their log-probabilities, from (S, n) numbers."""
    logits, parts = state.logits(), []
    for start in range(0, len(logits), ROWS):
        rows = slice(start, start + ROWS)
        parts.append(_draw(logits[rows], uniform[rows], sampling, distinct))
    tokens, log_probs = (torch.cat(part) for part in zip(*parts, strict=True))
    if not distinct or uniform.shape[1] > 1 or len(tokens) == 1:
        return tokens, log_probs
    # Each candidate has its own sequence; those of equal sequences take turns.
    _, group, sizes = torch.unique(state.tokens, dim=0, return_inverse=True, return_counts=True)
    for number in (sizes > 1).nonzero().flatten().tolist():
        members = (group == number).nonzero().flatten()
        drawn = _draw(logits[members[:1]], uniform[members].T, sampling, distinct)
        tokens[members], log_probs[members] = drawn[0].T, drawn[1].T
    return tokens, log_probs


def _draw(logits: Tensor, uniform: Tensor, sampling: Sampling, distinct: bool) -> tuple[Tensor, Tensor]:
    """N tokens from each of B distributions from (B, N) numbers, and their log-probabilities: (B, N) each."""
    filtered, each = filter_logits(logits, *sampling), uniform.shape[1]
    if sampling.temperature == 0:
        likely = filtered.topk(min(each, filtered.shape[1])).indices
        tokens = likely[:, torch.arange(each, device=likely.device) % filtered.shape[1]]
    else:
        draw = draw_distinct if distinct and each > 1 else draw_tokens
        tokens = draw(filtered, uniform)
    return tokens, token_log_probs(filtered, tokens)
