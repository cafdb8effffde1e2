"""The interface of a prior for search, and a uniform prior without a model.

Shapes: B sequences, k tokens, K positions, V vocabulary, N branches.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, Self

import torch
from torch import Tensor

from flextok_pl.contracts import PositionScale
from flextok_pl.models.generation import Work
from flextok_pl.models.prior import Condition
from flextok_pl.models.sampling import Sampling, draw_tokens


class State(Protocol):
    """B sequences that grow; see `flextok_pl.models.generation.GenerationState`."""

    @property
    def tokens(self) -> Tensor:
        """(B, k) int64."""

    @property
    def work(self) -> Work:
        """Counts the computation for this state and all others that branched from the same one."""

    def logits(self) -> Tensor:
        """Guided logits of the next token, (B, V) float32."""

    def extend(self, count: int, uniform: Tensor | None, sampling: Sampling, log_probs: Tensor | None = None) -> None:
        """Draw `count` tokens for each sequence from (B, K) numbers."""

    def branch(self, rows: Tensor, tokens: Tensor, most: int) -> Self:
        """Make a state of (N,) of these sequences, each with one more token."""


class SearchPrior(Protocol):
    """Extends sequences; a `Prior` or a `UniformPrior`."""

    @property
    def num_tokens(self) -> int:
        """K."""

    @property
    def device(self) -> torch.device:
        """The device that it computes on."""

    def begin(
        self,
        condition: Condition = None,
        prefix: Tensor | None = None,
        cfg_scale: PositionScale = 1.0,
        num_tokens: int | None = None,
    ) -> State:
        """Make the state of (B, m) first tokens, with room for `num_tokens`."""


@dataclass(frozen=True)
class UniformPrior:
    """A prior in which all tokens are equally likely: searches the vocabulary without training.

    It has no guidance and no most likely token. It counts no positions.
    """

    vocab_size: int  # V
    num_tokens: int  # K
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def begin(
        self,
        condition: Condition = None,
        prefix: Tensor | None = None,
        cfg_scale: PositionScale = 1.0,
        num_tokens: int | None = None,
    ) -> "UniformState":
        """Make the state of (B, m) first tokens, by default of one empty sequence; the rest has no effect."""
        tokens = torch.zeros(1, 0, dtype=torch.int64) if prefix is None else prefix
        return UniformState(tokens.to(self.device), self.vocab_size)


@dataclass
class UniformState:
    """B sequences of a `UniformPrior`; see `State`."""

    tokens: Tensor  # (B, k) int64
    vocab_size: int
    work: Work = field(default_factory=Work)

    def logits(self) -> Tensor:
        """(B, V) zeros."""
        return torch.zeros(1, self.vocab_size, device=self.tokens.device).expand(len(self.tokens), -1)

    def extend(self, count: int, uniform: Tensor | None, sampling: Sampling, log_probs: Tensor | None = None) -> None:
        """Draw `count` tokens for each sequence from (B, K) numbers.

        Raises:
            ValueError: `uniform` is None, which asks for the most likely tokens.
        """
        if uniform is None or sampling.temperature == 0:
            raise ValueError(
                "a uniform prior has no most likely token: leave out lookahead, complete and temperature=0"
            )
        first = self.tokens.shape[1]
        drawn = draw_tokens(self.logits()[:1], uniform[:, first : first + count].reshape(1, -1))
        self.tokens = torch.cat([self.tokens, drawn.view(-1, count)], 1)
        if log_probs is not None:
            log_probs.sub_(count * math.log(self.vocab_size))

    def branch(self, rows: Tensor, tokens: Tensor, most: int) -> "UniformState":
        """Make a state of (N,) of these sequences, each with one more token."""
        return UniformState(torch.cat([self.tokens[rows], tokens[:, None]], 1), self.vocab_size)
