"""The options of a search."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from flextok_pl.contracts import check_sampling, is_whole
from flextok_pl.flow.decoding import Decoding
from flextok_pl.models.sampling import Sampling
from flextok_pl.search.schedule import token_counts


@dataclass(frozen=True)
class SearchOptions:
    """Options of a search over the tokens of one image.

    Args:
        algorithm: `best_of_n`, `beam` or `lookahead`.
        num_candidates: sequences to choose from: in total for best-of-N, otherwise for each sequence of the beam.
        beam_width: sequences that a step keeps.
        schedule: numbers of tokens at which sequences are scored: `geometric` for 1, 2, 4, ..., `linear`, or a list.
        tokens_per_step: step of the linear schedule.
        max_tokens: last number of tokens of the schedule; null for all K tokens.
        branch: where the candidates of one sequence differ: `all` new tokens, or only the `last` one, which saves most
            of the prior's work.
        distinct: candidates that differ only in their last token draw it without replacement. If fewer tokens can
            follow than there are candidates, tokens repeat.
        lookahead: tokens that the prior adds greedily to the images that lookahead search scores.
        complete: finally add tokens greedily up to all K, and score the results again.
        cfg_scale: guidance of the prior, 1 for none: a number, or numbers to interpolate over the token positions.
        temperature: temperature of the prior; 0 takes the most likely tokens.
        top_k: draw from the k most likely tokens; null for all.
        top_p: draw from the fewest most likely tokens that together have this probability; null for all.
        decoding: steps and guidance of the decoder.
        decode_batch_size: candidates decoded at a time, and drawn at a time with best-of-N. Changes results by rounding
            at most.
        vary_noise: with best-of-N, decode each candidate from its own noise, otherwise all from the same.
        seed: seed of tokens and noise.
        num_results: sequences to return.

    Raises:
        ValueError: an option is out of range, or does not fit the others.
    """

    algorithm: Literal["best_of_n", "beam", "lookahead"] = "beam"
    num_candidates: int = 10
    beam_width: int = 5
    schedule: Literal["geometric", "linear"] | list[int] = "geometric"
    tokens_per_step: int = 32
    max_tokens: int | None = None
    branch: Literal["all", "last"] = "all"
    distinct: bool = True
    lookahead: int = 8
    complete: bool = False
    cfg_scale: float | list[float] = 1.0
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    decoding: Decoding = field(default_factory=Decoding)
    decode_batch_size: int = 50
    vary_noise: bool = False
    seed: int = 0
    num_results: int = 1

    def __post_init__(self) -> None:
        for name, known in (("algorithm", ("best_of_n", "beam", "lookahead")), ("branch", ("all", "last"))):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")
        for name in (
            "num_candidates",
            "beam_width",
            "tokens_per_step",
            "lookahead",
            "decode_batch_size",
            "num_results",
        ):
            if not is_whole(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be a whole number of at least 1")
        check_sampling(*self.sampling)
        if self.temperature == 0 and self.num_candidates > 1 and not self.distinct:
            raise ValueError(
                f"temperature=0 makes all num_candidates={self.num_candidates} equal: set distinct=true to take the "
                "most likely last tokens, or a temperature"
            )
        if self.vary_noise and self.algorithm != "best_of_n":
            raise ValueError(
                f"vary_noise=true with algorithm={self.algorithm!r}: a beam compares tokens, so all need the same "
                "noise; leave it out, or use best_of_n"
            )

    @property
    def sampling(self) -> Sampling:
        """Options for drawing the prior's tokens."""
        return Sampling(self.temperature, self.top_k, self.top_p)

    def counts(self, num_tokens: int) -> list[int]:
        """Numbers of tokens after each step, for a prior of K tokens.

        Raises:
            ValueError: the schedule does not fit the prior.
        """
        most = num_tokens if self.max_tokens is None else self.max_tokens
        if not is_whole(most) or not 1 <= most <= num_tokens:
            raise ValueError(f"max_tokens={most} is not in 1..{num_tokens}, the range of this prior")
        return token_counts(self.schedule, self.tokens_per_step, most)
