"""Best-of-N, beam search and lookahead search for the tokens of one image.

They follow SoTo (https://github.com/EPFL-VILAB/search-over-tokens). The candidates of all sequences of the beam form
one pool, of which the best are kept; each step's score replaces the previous one. Draws are functions of (seed, prompt,
candidate), and each prompt has one noise. So results do not depend on other prompts or on how many images are decoded
at once. A search that resumes from a saved step ends as if it had not stopped. Equal scores are ordered by candidate
number.

Shapes: W sequences that are kept, N candidates of each, C candidates in all, k tokens, K positions.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flextok_pl.evaluation.generation import Prompt
from flextok_pl.models.prior import Condition
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.candidates import draw_candidates
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.priors import SearchPrior
from flextok_pl.search.results import SearchResult, Step
from flextok_pl.search.run import Progress, SearchRun
from flextok_pl.search.scoring import Judge
from flextok_pl.search.verifier import Verifier


def best_of_n(
    prior: SearchPrior,
    tokenizer: FlexTok,
    verifier: Verifier,
    prompt: Prompt,
    condition: Condition,
    options: SearchOptions,
    start: Step | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Choose the best of `num_candidates` samples, with the schedule's last number of tokens; see `beam_search`.

    Candidate 0 is the sample of `Prior.generate` for this prompt. `branch` and `distinct` have no effect.
    """
    if options.temperature == 0 and options.num_candidates > 1:
        raise ValueError(f"temperature=0 makes all num_candidates={options.num_candidates} samples equal: raise it")
    judge, counts = Judge(tokenizer, verifier, prompt, options), options.counts(prior.num_tokens)[-1:]
    run = SearchRun(prior, judge, condition, counts, start, progress)
    for count in run.counts_left:
        root, numbers = run.begin(count), run.numbers()
        tokens: list[Tensor] = []
        log_probs: list[Tensor] = []
        images: list[Tensor] = []
        for part in torch.split(torch.arange(options.num_candidates, device=prior.device), options.decode_batch_size):
            alone = options.num_candidates == 1
            drawn = draw_candidates(root, count, numbers[:, part], options.sampling, last_only=alone, distinct=False)
            tokens.append(drawn.tokens)
            log_probs.append(drawn.log_probs)
            made = judge.images(tokens[-1], part.tolist())
            images += [] if made is None else [made]
        run.keep(torch.cat(tokens), torch.cat(log_probs), torch.cat(images) if images else None)
    return run.result()


def beam_search(
    prior: SearchPrior,
    tokenizer: FlexTok,
    verifier: Verifier,
    prompt: Prompt,
    condition: Condition,
    options: SearchOptions,
    start: Step | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Keep the best `beam_width` sequences at each number of tokens of the schedule.

    Args:
        prior: a `Prior`, or a `UniformPrior` to search over the vocabulary.
        tokenizer: decodes tokens; not used with a verifier that needs no images.
        verifier: scores images or tokens; an error that it raises ends the search.
        prompt: the prompt; its key seeds tokens and noise.
        condition: the prior's condition: a class (1,), or the states of a text, or None.
        options: see `SearchOptions`; its `algorithm` has no effect.
        start: a saved step of the same search, to resume from.
        progress: called after each step.

    Raises:
        ValueError: options, prior and start do not fit together, or the verifier returns no scores.
    """
    return _beam(prior, Judge(tokenizer, verifier, prompt, options), condition, start, progress, ahead=0)


def lookahead_search(
    prior: SearchPrior,
    tokenizer: FlexTok,
    verifier: Verifier,
    prompt: Prompt,
    condition: Condition,
    options: SearchOptions,
    start: Step | None = None,
    progress: Progress | None = None,
) -> SearchResult:
    """Beam search that scores images of `lookahead` further tokens, which the prior adds greedily.

    The results include these tokens and are not scored again. Arguments are those of `beam_search`.
    """
    ahead = options.lookahead
    return _beam(prior, Judge(tokenizer, verifier, prompt, options), condition, start, progress, ahead)


ALGORITHMS: dict[str, Callable[..., SearchResult]] = {
    "best_of_n": best_of_n,
    "beam": beam_search,
    "lookahead": lookahead_search,
}
"""Algorithms by their names in `SearchOptions.algorithm`."""


def _beam(
    prior: SearchPrior,
    judge: Judge,
    condition: Condition,
    start: Step | None,
    progress: Progress | None,
    ahead: int,
) -> SearchResult:
    options, counts = judge.options, judge.options.counts(prior.num_tokens)
    run = SearchRun(prior, judge, condition, counts, start, progress, ahead)
    last_only = options.branch == "last" or options.num_candidates == 1 or options.temperature == 0
    left, numbers = run.counts_left, run.numbers()
    state = run.begin(left[0]) if left else None
    for place, count in enumerate(left):
        assert state is not None
        width, length = state.tokens.shape
        drawn = draw_candidates(state, count - length, numbers[:width], options.sampling, last_only, options.distinct)
        kept = run.keep(drawn.tokens, drawn.log_probs, judge.images(run.looked_ahead(drawn)))
        if count != counts[-1]:
            state = drawn.branch(kept, left[place + 1])
    return run.result()
