"""A finished prior with its tokenizer, so that both can be evaluated without the experiments that trained them."""

from __future__ import annotations

from flextok_pl.models.prior import Prior
from flextok_pl.models.text import TextEncoder
from flextok_pl.modules.prior_base import PriorBase


class SavedPrior(PriorBase):
    """A prior from a file, for `validate`, `test` and `predict`.

    Args:
        path: see `Prior.from_pretrained`.
        tokenizer: the tokenizer whose tokens it knows: see `FlexTok.from_pretrained`.
        text_encoder: in place of the name that the prior's file states, such as a local copy of the same encoder.

    Raises:
        ValueError: a file is missing or damaged, or they do not fit together.
    """

    def __init__(self, path: str, tokenizer: str | None, text_encoder: str | None = None) -> None:
        prior = Prior.from_pretrained(path)
        name = text_encoder or prior.config.text_encoder
        super().__init__(prior, tokenizer, TextEncoder(name) if name else None)
