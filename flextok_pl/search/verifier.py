"""The interface of a verifier, and what it gets besides the images.

Shapes: B candidates, k tokens, H x W image.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from flextok_pl.evaluation.generation import Prompt
from flextok_pl.precision import as_float64


class Context(NamedTuple):
    """Facts of B candidates besides their images."""

    tokens: Tensor  # (B, k) int64, without those that lookahead adds for the image only
    log_probs: Tensor | None = None  # (B,) float64, of all k tokens under the sampling distribution: see `Step`
    last_log_probs: Tensor | None = None  # (B,) float64, of the tokens of the newest step only


class Verifier(Protocol):
    """Scores candidates; an error in `score` ends the search.

    The score of a candidate does not depend on the others. Only an ensemble that ranks may compare them: it is called
    once for each prompt and step, with the whole pool.
    """

    @property
    def name(self) -> str:
        """Its name in records."""

    @property
    def needs_images(self) -> bool:
        """Whether it needs decoded images of the candidates."""

    def score(self, images: Tensor | None, prompts: Sequence[Prompt], context: Context) -> Tensor:
        """(B, 3, H, W) uint8 images, or None if `needs_images` is False, and B prompts -> (B,) float64.

        Higher is better.
        """


def checked_scores(scores: object, verifier: str, prompts: Sequence[Prompt]) -> Tensor:
    """Convert the scores of a verifier for candidates of B prompts to (B,) float64 on the CPU.

    Raises:
        ValueError: they are not a number for each candidate.
    """
    if not isinstance(scores, Tensor) or scores.shape != (len(prompts),):
        found = f"a tensor {tuple(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ValueError(f"verifier={verifier!r} gives {found}, not a tensor ({len(prompts)},) of scores")
    scores = as_float64(scores.detach()).cpu()
    if scores.isnan().any():
        key = prompts[int(scores.isnan().nonzero()[0])].key
        raise ValueError(
            f"verifier={verifier!r} gives NaN as a score of the prompt {key!r}, which a search cannot order; correct "
            "the verifier, or use another"
        )
    return scores
