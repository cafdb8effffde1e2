"""The results of a search, and their cost.

Shapes: W kept sequences, k tokens, n returned sequences.
"""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor


@dataclass(frozen=True)
class Cost:
    """Counts the computation of a search."""

    prior_positions: int = 0  # positions that the prior ran, including those of the null condition
    decoder_calls: int = 0  # evaluations of the decoder for one image, including those of the null condition
    decoded_images: int = 0
    verifier_calls: int = 0  # candidates that were scored

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(
            self.prior_positions + other.prior_positions,
            self.decoder_calls + other.decoder_calls,
            self.decoded_images + other.decoded_images,
            self.verifier_calls + other.verifier_calls,
        )


class Step(NamedTuple):
    """The sequences that a step of a search kept, best first; a search can resume from it."""

    num_tokens: int  # k
    tokens: Tensor  # (W, k) int64
    scores: Tensor  # (W,) float64
    log_probs: Tensor  # (W,) float64, sums over all k tokens, under the guided, tempered and filtered distribution
    parents: Tensor  # (W,) int64, positions in the step before; -1 in the first one
    candidates: Tensor  # (W,) int64, numbers in the step's pool, which seed draws: parent * num_candidates + j
    cost: Cost  # up to this step


class SearchResult(NamedTuple):
    """The best sequences of a search."""

    tokens: Tensor  # (n, k) int64, best first
    scores: Tensor  # (n,) float64
    log_probs: Tensor  # (n,) float64
    candidates: Tensor  # (n,) int64, numbers in the last step's pool; see `candidate_keys`
    steps: list[Step]  # all steps since the start, included
    cost: Cost
