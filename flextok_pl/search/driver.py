"""Search for each of many prompts, in several processes, and resume after a kill.

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
    """The models of a search."""

    prior: SearchPrior
    tokenizer: FlexTok
    known: Conditions
    condition: Callable[[Prompt], Condition]  # condition of a prompt, for a batch of one
    facts: Mapping[str, Any]  # identify the models
    published: GenerationConfig  # generation settings that the prior was published with


@dataclass(frozen=True)
class Searcher:
    """Searches for a prompt; see `flextok_pl.search.algorithms`."""

    prior: SearchPrior
    tokenizer: FlexTok
    verifier: Verifier
    condition: Callable[[Prompt], Condition]
    options: SearchOptions

    @property
    def num_steps(self) -> int:
        """Number of steps of a search."""
        return 1 if self.options.algorithm == "best_of_n" else len(self.options.counts(self.prior.num_tokens))

    def search(self, prompt: Prompt, start: Step | None = None, progress: Progress | None = None) -> SearchResult:
        """Search for a prompt, from a saved step if one is given; see `beam_search`."""
        search, condition = ALGORITHMS[self.options.algorithm], self.condition(prompt)
        what = (self.prior, self.tokenizer, self.verifier, prompt, condition, self.options)
        return search(*what, start=start, progress=progress)

    def images(self, prompt: Prompt, tokens: Tensor, candidates: Tensor) -> Tensor:
        """Decode sequences (W, k) with numbers (W,) in their step's pool: (W, 3, H, W) uint8."""
        return decode_tokens(self.tokenizer, tokens, prompt, self.options, candidates.tolist()).cpu()

    def tree_row(self, prompt: Prompt, step: Step) -> TreeRow:
        """The kept sequences of a step, for the picture of a search; see `search_tree`."""
        images = self.images(prompt, step.tokens, step.candidates)
        return TreeRow(step.num_tokens, images, step.scores.tolist(), step.parents.tolist())


def search_prompts(
    searcher: Searcher, prompts: Sequence[Prompt], folder: RunFolder, trees: int = 0
) -> list[Record] | None:
    """Search for this process's share of the prompts, see `launched`, and write the results.

    Prompts with a record in the folder are skipped, and an interrupted one resumes after its last step. For the first
    `trees` prompts, the kept sequences of each step are decoded once more and drawn as a picture.

    Returns:
        The records of all prompts; None while other processes still search.

    Raises:
        ValueError: the folder holds another run, or the algorithm raises one.
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
