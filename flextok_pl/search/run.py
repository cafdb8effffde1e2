"""Run one search: states of the prior, the pool of each step, the kept sequences, and the result.

Shapes: W sequences that are kept, N candidates of each, C candidates in all, k tokens, K positions, H x W image.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flextok_pl.models.generation import Work
from flextok_pl.models.prior import Condition, TextStates
from flextok_pl.models.sampling import GREEDY
from flextok_pl.precision import accumulation_dtype, as_float64
from flextok_pl.search.candidates import Candidates, candidate_numbers
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.priors import SearchPrior, State, UniformPrior
from flextok_pl.search.results import Cost, SearchResult, Step
from flextok_pl.search.scoring import Judge
from flextok_pl.search.verifier import Context

Progress = Callable[[Step, Tensor | None, Cost], None]
"""Gets each finished step, its best image (3, H, W) uint8 if the verifier saw one, and the cost so far."""


@dataclass
class SearchRun:
    """A search for one prompt over a schedule of numbers of tokens.

    Raises:
        ValueError: options, prior, condition and start do not fit together.
    """

    prior: SearchPrior
    judge: Judge
    condition: Condition
    counts: list[int]
    start: Step | None
    progress: Progress | None
    ahead: int = 0  # tokens added for the images
    steps: list[Step] = field(init=False)
    work: list[Work] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        options = self.judge.options
        self.steps = [] if self.start is None else [self.start]
        if self.start is not None:
            self.judge.cost = self.start.cost
        _check_condition(self.condition)
        if isinstance(self.prior, UniformPrior):
            _check_uniform(options, self.ahead)
        self._check_widths()

    @property
    def counts_left(self) -> list[int]:
        """Numbers of tokens of the remaining steps."""
        done = 0 if self.start is None else self.start.num_tokens
        return [count for count in self.counts if count > done]

    @property
    def cost(self) -> Cost:
        """So far."""
        return self.judge.cost + Cost(prior_positions=sum(work.positions for work in self.work))

    def numbers(self) -> Tensor:
        """(W, N, K) uniform numbers of the candidates at each position of the beam."""
        options, pools = self.judge.options, 1 if len(self.counts) == 1 else self.judge.options.beam_width
        count, key = pools * options.num_candidates, self.judge.prompt.key
        numbers = candidate_numbers(key, options.seed, count, self.prior.num_tokens, self.prior.device)
        return numbers.view(pools, options.num_candidates, -1)

    def begin(self, most: int) -> State:
        """Make the state of the last kept sequences, or of the empty one, with room for `most` tokens.

        Its cost is counted as if the search had not been interrupted.
        """
        tokens = self.steps[-1].tokens if self.steps else torch.zeros(1, 0, dtype=torch.int64)
        state = self._begin(tokens, most)
        state.work.positions //= tokens.shape[1] + 1  # counts only the newest positions
        return state

    def _begin(self, tokens: Tensor, most: int) -> State:
        condition, scale = repeated(self.condition, len(tokens)), self.judge.options.cfg_scale
        state = self.prior.begin(condition, tokens.to(self.prior.device), scale, most)
        self.work.append(state.work)
        return state

    def looked_ahead(self, candidates: Candidates) -> Tensor:
        """The tokens of candidates, (C, k'), with those that the prior adds for their images, if images are needed."""
        tokens = candidates.tokens
        if not self.judge.verifier.needs_images:
            return tokens
        ahead = min(self.ahead, self.prior.num_tokens - tokens.shape[1])
        if not ahead:
            return tokens
        parts = []
        numbers = torch.arange(len(tokens), device=tokens.device)
        for chosen in torch.split(numbers, self.judge.options.decode_batch_size):
            state = candidates.branch(chosen, tokens.shape[1] + ahead)
            state.extend(ahead, None, GREEDY)
            parts.append(state.tokens)
        return torch.cat(parts)

    def _check_widths(self) -> None:
        """Refuse results that no step can return, and a start of another search."""
        options, widths = self.judge.options, [1]
        for _ in self.counts:
            widths.append(min(options.beam_width, widths[-1] * options.num_candidates))
        pool = widths[-2] * options.num_candidates
        if options.num_results > pool:
            raise ValueError(
                f"num_results={options.num_results}, but the last step has {pool} candidates: set more num_candidates"
            )
        widths[-1] = min(pool, max(options.beam_width, options.num_results))
        if self.start is not None:
            known = dict(zip(self.counts, widths[1:], strict=True))
            if known.get(self.start.num_tokens) != len(self.start.tokens):
                raise ValueError(
                    f"start holds {len(self.start.tokens)} sequences of {self.start.num_tokens} tokens, but this "
                    f"search keeps {known} (sequences at each number of tokens): start with the options of the search "
                    "that saved it"
                )

    def keep(self, tokens: Tensor, log_probs: Tensor, images: Tensor | None) -> Tensor:
        """Score the pool of a step and record the best candidates.

        Args:
            tokens: (C, k) int64.
            log_probs: (C,), of the new tokens.
            images: (C, 3, H, W) uint8, if the verifier needs them.

        Returns:
            (W,) int64 numbers of the kept candidates, best first, on the tokens' device.
        """
        options, before, tokens_here = self.judge.options, self.steps[-1] if self.steps else None, tokens.cpu()
        last = as_float64(log_probs).cpu()
        total = last if before is None else last + before.log_probs.repeat_interleave(options.num_candidates)
        scores = self.judge.scores(images, Context(tokens_here, total, last))
        count = tokens.shape[1]
        width = max(options.beam_width, options.num_results) if count == self.counts[-1] else options.beam_width
        kept = scores.sort(descending=True, stable=True).indices[:width]
        parents = torch.full_like(kept, -1) if before is None else kept // options.num_candidates
        step = Step(count, tokens_here[kept], scores[kept], total[kept], parents, kept, self.cost)
        self.steps.append(step)
        if self.progress is not None:
            self.progress(step, None if images is None else images[int(kept[0])].cpu(), step.cost)
        return kept.to(tokens.device)

    def result(self) -> SearchResult:
        """The best sequences of the last step, with the tokens that its images had, or all K."""
        options, last = self.judge.options, self.steps[-1]
        tokens, scores, log_probs, _, candidates = (part[: options.num_results] for part in last[1:6])
        most = self.prior.num_tokens
        more = most - last.num_tokens if options.complete else min(self.ahead, most - last.num_tokens)
        if more:
            state = self._begin(tokens, last.num_tokens + more)
            new = torch.zeros(len(tokens), dtype=accumulation_dtype(self.prior.device), device=self.prior.device)
            state.extend(more, None, GREEDY, new)
            tokens = state.tokens.cpu()
            if options.complete:
                added = as_float64(new).cpu()
                log_probs = log_probs + added
                images = self.judge.images(tokens, candidates.tolist())
                scores = self.judge.scores(images, Context(tokens, log_probs, added))
                order = scores.sort(descending=True, stable=True).indices
                tokens, scores, log_probs, candidates = (
                    part[order] for part in (tokens, scores, log_probs, candidates)
                )
        return SearchResult(tokens, scores, log_probs, candidates, self.steps, self.cost)


def _check_condition(condition: Condition) -> None:
    if condition is not None and len(condition if isinstance(condition, Tensor) else condition[0]) != 1:
        raise ValueError("condition has more than one entry: search for one prompt at a time")


def _check_uniform(options: SearchOptions, ahead: int) -> None:
    given = {name: getattr(options, name) for name in ("temperature", "top_k", "top_p", "complete")}
    usual = {"temperature": 1.0, "top_k": None, "top_p": None, "complete": False, "lookahead": 0}
    for name, value in (given | {"lookahead": ahead}).items():
        if value != usual[name]:
            raise ValueError(f"{name}={value}: a uniform prior makes all tokens equally likely; leave it out")


def repeated(condition: Condition, count: int) -> Condition:
    """Repeat the condition of one prompt for several sequences."""
    if condition is None:
        return None
    if isinstance(condition, Tensor):
        return condition.expand(count, *condition.shape[1:])
    states, mask = condition
    return TextStates(states.expand(count, -1, -1), mask.expand(count, -1))
