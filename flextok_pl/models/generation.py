"""Grow sequences of tokens, with a cache of the keys and values of a prior.

A `GenerationState` continues token by token, with a draw for each sequence, or splits into several branches that share
the computed prefix. Conditional and null rows are one batch.

Shapes: B sequences, k tokens, K positions, D width, V vocabulary, R rows (2B under guidance), N branches.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from flextok_pl.layers.causal import KeyValueCache, TextMemory, Window
from flextok_pl.models.arguments import as_generators
from flextok_pl.models.cuda_graph import repeat
from flextok_pl.models.sampling import Sampling, draw_tokens, filter_logits, token_log_probs
from flextok_pl.precision import accumulation_dtype, full_precision


class CausalModel(Protocol):
    """The interface of a prior that generation needs."""

    def embed_next(self, tokens: Tensor, place: Tensor) -> Tensor:
        """The input of the blocks for one more position: (R, 1) tokens and the position (1,) -> (R, 1, D)."""

    def run(self, x: Tensor, memories: list[TextMemory | None], caches: list[KeyValueCache] | None = None) -> Tensor:
        """All blocks and the last norm: (R, L, D) -> (R, L, D)."""

    def logits(self, states: Tensor) -> Tensor:
        """(R, D) -> (R, V) float32."""


@dataclass
class Work:
    """Counts the computation of a state and all its branches."""

    positions: int = 0  # of all rows


@dataclass
class GenerationState:
    """B sequences and their caches; `begin_generation` makes one.

    The newest token is run only when you ask for the logits after it.
    """

    model: CausalModel
    buffer: Tensor  # (B, most) int64, of which the first `count` are set
    count: int
    memories: list[TextMemory | None]  # of R rows
    caches: list[KeyValueCache]  # of R rows, conditional ones first
    scales: Tensor  # (K,) guidance of each position
    guided: bool  # R = 2B
    graph_device: torch.device | None  # device on which steps become a CUDA graph
    finite: Tensor  # () bool, True while all logits are finite
    work: Work = field(default_factory=Work)
    following: Tensor | None = None  # (B, V) guided logits after the newest token

    @property
    def tokens(self) -> Tensor:
        """(B, k) int64."""
        return self.buffer[:, : self.count]

    @torch.no_grad()
    def logits(self) -> Tensor:
        """Guided logits of the next token, (B, V) float32.

        Raises:
            ValueError: some logits are NaN or infinite.
        """
        with full_precision(self.buffer.device):
            following = self._follow()
        self._check_finite()
        return following

    @torch.no_grad()
    def extend(self, count: int, uniform: Tensor | None, sampling: Sampling, log_probs: Tensor | None = None) -> None:
        """Draw `count` tokens for each sequence.

        Args:
            count: at least 1; a state holds at most `most` tokens.
            uniform: (B, K) in [0, 1), one number for each position; None takes the most likely tokens.
            sampling: temperature, top-k and top-p.
            log_probs: (B,), to which the tokens' log-probabilities are added in place; see `filter_logits`.

        Raises:
            ValueError: some logits are NaN or infinite.
        """
        place = self._place()  # of the next token to draw

        def draw(logits: Tensor) -> None:
            filtered = filter_logits(logits, *sampling)
            if sampling.temperature == 0 or uniform is None:
                drawn = filtered.argmax(-1, keepdim=True)
            else:
                drawn = draw_tokens(filtered, uniform.index_select(1, place))  # (B, 1)
            if log_probs is not None:
                log_probs.add_(token_log_probs(filtered, drawn)[:, 0])
            self.buffer.index_copy_(1, place, drawn)
            place.add_(1)

        def step() -> None:
            if window is not None:
                window.open()
            draw(self._after_newest(place))

        with full_precision(self.buffer.device):
            draw(self._follow())
            # Growing shapes save a CPU half of the attention; a graph needs fixed shapes.
            window = None if self.graph_device is None else Window.over(self.caches[0], place)
            for cache in self.caches:
                cache.window = window
            repeat(step, count - 1, self.graph_device)
        self.count += count
        self.following = None
        self.work.positions += self._rows * (count - 1)
        for cache in self.caches:
            cache.window, cache.filled = None, self.count
        self._check_finite()

    @torch.no_grad()
    def branch(self, rows: Tensor, tokens: Tensor, most: int) -> "GenerationState":
        """A state of N of these sequences, each with one more token; this state does not change.

        Args:
            rows: (N,) int64 sequences; one may occur several times.
            tokens: (N,) int64, the next token of each.
            most: number of tokens that the new state has room for.
        """
        with full_precision(self.buffer.device):
            self._follow()  # so that all branches share it
        batch = len(self.buffer)
        both = torch.cat([rows, rows + batch]) if self.guided else rows
        buffer = self.buffer.new_zeros(len(rows), most)
        buffer[:, : self.count] = self.tokens.index_select(0, rows)
        buffer[:, self.count] = tokens
        return replace(
            self,
            buffer=buffer,
            count=self.count + 1,
            memories=[None if memory is None else memory.select(both) for memory in self.memories],
            caches=[cache.select(both, most) for cache in self.caches],
            following=None,
        )

    @property
    def _rows(self) -> int:
        return len(self.buffer) * (2 if self.guided else 1)

    def _place(self) -> Tensor:
        """The position of the next token, (1,) int64 on the device, so that the host does not wait."""
        return torch.full((1,), self.count, device=self.buffer.device)

    def _follow(self) -> Tensor:
        if self.following is None:
            self.following = self._after_newest(self._place())
            self.work.positions += self._rows
        return self.following

    def _after_newest(self, place: Tensor) -> Tensor:
        """Run the token before position (1,): (B, V)."""
        newest = self.buffer.index_select(1, place - 1).repeat(2 if self.guided else 1, 1)  # (R, 1)
        return self._predict(self.model.embed_next(newest, place), place)

    def _predict(self, x: Tensor, place: Tensor) -> Tensor:
        """Guided logits (B, V) after the last of (R, L, D) new positions, for position `place` (1,)."""
        logits = self.model.logits(self.model.run(x, self.memories, self.caches)[:, -1])  # (R, V)
        self.finite.logical_and_(logits.sum().isfinite())
        if not self.guided:
            return logits
        conditional, unconditional = logits.chunk(2)
        return torch.lerp(unconditional, conditional, self.scales.index_select(0, place))

    def _check_finite(self) -> None:
        if not self.finite:
            raise ValueError("the prior's logits hold NaN or infinity: check its weights and the texts' states")


@torch.no_grad()
def begin_generation(
    model: CausalModel,
    tokens: Tensor,
    x: Tensor,
    memories: list[TextMemory | None],
    scales: Sequence[float],
    most: int,
    graph_device: torch.device | None,
) -> GenerationState:
    """Run the (B, m) first tokens and return their state.

    Args:
        model: the prior.
        tokens: (B, m) int64, m < most.
        x: (R, m+1, D), the input of the blocks: R = B, or R = 2B with the null condition in the last rows.
        memories: text memories of the R rows, one for each block.
        scales: guidance of K positions.
        most: number of tokens that the state has room for.
        graph_device: device on which steps may become a CUDA graph; None for no graph.
    """
    batch, count = tokens.shape
    buffer = tokens.new_zeros(batch, most)
    buffer[:, :count] = tokens
    state = GenerationState(
        model=model,
        buffer=buffer,
        count=count,
        memories=memories,
        caches=[KeyValueCache(most) for _ in memories],
        scales=torch.tensor(scales, device=tokens.device),
        guided=len(x) > batch,
        graph_device=graph_device,
        finite=torch.ones((), dtype=torch.bool, device=tokens.device),
    )
    with full_precision(tokens.device):
        state.following = state._predict(x, state._place())
    state.work.positions = len(x) * x.shape[1]
    return state


def uniform_numbers(
    generator: torch.Generator | Sequence[torch.Generator] | None, batch: int, length: int, device: torch.device
) -> Tensor:
    """Draw (B, K) uniform numbers row by row and put them on a device; one decides each token of a sequence."""
    rows = []
    for each in as_generators(generator, batch):
        place = torch.device("cpu") if each is None else each.device
        rows.append(torch.rand(length, generator=each, device=place, dtype=accumulation_dtype(place)).cpu())
    return torch.stack(rows).to(accumulation_dtype(device)).to(device)
