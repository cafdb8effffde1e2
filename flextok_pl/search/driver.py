"""A search for each of many prompts, by several processes, which goes on after a kill.

W sequences of k tokens, H x W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from tqdm import tqdm

from flextok_pl.config import GenerationConfig
from flextok_pl.distributed import launched
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.evaluation.report import Record, format_value
from flextok_pl.models.prior import Condition
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.algorithms import ALGORITHMS
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.pictures import TreeRow, search_tree
from flextok_pl.search.priors import SearchPrior
from flextok_pl.search.prompts import Conditions
from flextok_pl.search.records import RunFolder
from flextok_pl.search.results import Cost, SearchResult, Step
from flextok_pl.search.run import Progress
from flextok_pl.search.scoring import decode_tokens
from flextok_pl.search.verifier import Verifier


@dataclass(frozen=True)
class Models:
    """What a search runs."""

    prior: SearchPrior
    tokenizer: FlexTok
    known: Conditions
    condition: Callable[[Prompt], Condition]  # of a prompt, for a batch of one
    facts: Mapping[str, Any]  # which models these are
    published: GenerationConfig  # how those who published the prior generate with it


@dataclass(frozen=True)
class Searcher:
    """What searches for a prompt; see `flextok_pl.search.algorithms`."""

    prior: SearchPrior
    tokenizer: FlexTok
    verifier: Verifier
    condition: Callable[[Prompt], Condition]
    options: SearchOptions

    @property
    def num_steps(self) -> int:
        """Steps of a search."""
        return 1 if self.options.algorithm == "best_of_n" else len(self.options.counts(self.prior.num_tokens))

    def search(self, prompt: Prompt, start: Step | None = None, progress: Progress | None = None) -> SearchResult:
        """Search for a prompt, from a saved step if one is given; see `beam_search`."""
        search, condition = ALGORITHMS[self.options.algorithm], self.condition(prompt)
        what = (self.prior, self.tokenizer, self.verifier, prompt, condition, self.options)
        return search(*what, start=start, progress=progress)

    def images(self, prompt: Prompt, tokens: Tensor, candidates: Tensor) -> Tensor:
        """Decode sequences (W, k) that have these numbers (W,) in their step's pool: (W, 3, H, W) uint8."""
        return decode_tokens(self.tokenizer, tokens, prompt, self.options, candidates.tolist()).cpu()

    def tree_row(self, prompt: Prompt, step: Step) -> TreeRow:
        """What a step kept, for the picture of a search; see `search_tree`."""
        images = self.images(prompt, step.tokens, step.candidates)
        return TreeRow(step.num_tokens, images, step.scores.tolist(), step.parents.tolist())


def search_prompts(
    searcher: Searcher, prompts: Sequence[Prompt], folder: RunFolder, trees: int = 0
) -> list[Record] | None:
    """Search for this process's share of the prompts, see `launched`, and write what is found.

    Prompts that the folder has a record of are done, and one that was interrupted goes on after its last step. For the
    first `trees` prompts, what each step kept is decoded once more, and becomes a picture.

    Returns:
        The records of all prompts; None where other processes still search.

    Raises:
        ValueError: the folder holds another run, or see the algorithm.
    """
    num_steps, (rank, world_size) = searcher.num_steps, launched()
    folder.open()
    mine = range(rank, len(prompts), world_size)
    with tqdm(total=len(mine) * num_steps, desc="searching", unit="step", disable=rank > 0) as bar:
        for number in mine:
            if folder.record(number, prompts[number]) is None:
                _search_one(searcher, number, prompts[number], folder, number < trees, bar)
            else:
                bar.update(num_steps)
    return folder.gather(prompts)


def _search_one(
    searcher: Searcher, number: int, prompt: Prompt, folder: RunFolder, draw_tree: bool, bar: tqdm[Any]
) -> None:
    """Search for one prompt, from the last step that was saved."""
    steps = folder.steps(number, prompt)
    bar.update(len(steps))

    def progress(step: Step, best: Tensor | None, cost: Cost) -> None:
        steps.append(step)
        folder.keep_steps(number, prompt, steps, best)
        score = format_value(float(step.scores[0]))
        bar.set_postfix_str(f"{prompt.text or prompt.key}: {score} at k={step.num_tokens}")
        bar.update()

    result = searcher.search(prompt, steps[-1] if steps else None, progress)._replace(steps=steps)
    images = searcher.images(prompt, result.tokens, result.candidates)
    tree = search_tree([searcher.tree_row(prompt, step) for step in steps]) if draw_tree else None
    folder.finish(number, prompt, result, images, tree)
