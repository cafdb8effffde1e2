"""Decode and score candidates, and count the cost.

Shapes: C candidates, k tokens, H x W image.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from flextok_pl.evaluation.decoding import decode
from flextok_pl.evaluation.generation import Prompt
from flextok_pl.flow.decoding import Decoding
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.search.candidates import candidate_keys
from flextok_pl.search.options import SearchOptions
from flextok_pl.search.results import Cost
from flextok_pl.search.verifier import Context, Verifier, checked_scores


def decode_tokens(
    tokenizer: FlexTok, tokens: Tensor, prompt: Prompt, options: SearchOptions, candidates: Sequence[int] | None = None
) -> Tensor:
    """Decode (C, k) tokens to (C, 3, H, W) uint8 images, from the noise of plain sampling for this prompt.

    Args:
        tokenizer: tokenizer of the tokens.
        tokens: all of the same length.
        prompt: its key seeds the noise.
        options: uses `decoding`, `decode_batch_size`, `seed` and `vary_noise`.
        candidates: numbers of the sequences in their pool, which get their own noise with `vary_noise`.
    """
    numbers = [0] * len(tokens) if candidates is None or not options.vary_noise else candidates
    keys, parts = candidate_keys(prompt.key, numbers), []
    for start in range(0, len(tokens), options.decode_batch_size):
        part = slice(start, start + options.decode_batch_size)
        budgets = [tokens.shape[1]]
        decoded = decode(tokenizer, tokens[part], budgets, options.decoding, keys[part], options.seed)
        parts += [images for _, images in decoded]
    return torch.cat(parts)


def decoder_calls(decoding: Decoding, objective: str) -> int:
    """Evaluations of the decoder's network for one image, conditional and unconditional."""
    return sum(decoding.under(objective).calls())


@dataclass
class Judge:
    """Decodes and scores the candidates of one prompt, and counts the cost."""

    tokenizer: FlexTok
    verifier: Verifier
    prompt: Prompt
    options: SearchOptions
    cost: Cost = field(default_factory=Cost)

    def images(self, tokens: Tensor, candidates: Sequence[int] | None = None) -> Tensor | None:
        """The verifier's images of (C, k) tokens; `candidates` are their numbers in the pool."""
        if not self.verifier.needs_images:
            return None
        calls = len(tokens) * decoder_calls(self.options.decoding, self.tokenizer.config.objective)
        self.cost += Cost(decoder_calls=calls, decoded_images=len(tokens))
        return decode_tokens(self.tokenizer, tokens, self.prompt, self.options, candidates)

    def scores(self, images: Tensor | None, context: Context) -> Tensor:
        """(C,) float64 on the CPU.

        Raises:
            ValueError: the verifier does not return a number for each candidate.
        """
        count = len(context.tokens)
        self.cost += Cost(verifier_calls=count)
        prompts = [self.prompt] * count
        return checked_scores(self.verifier.score(images, prompts, context), self.verifier.name, prompts)
