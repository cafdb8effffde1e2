"""Finished models as LightningModules, to evaluate them without the experiments that trained them."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from flextok_pl.contracts import Batch
from flextok_pl.models.prior import Prior
from flextok_pl.models.text import TextEncoder
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.prior_base import PriorBase
from flextok_pl.modules.tokenizer_base import predicted_tokens


class SavedTokenizer(pl.LightningModule):
    """A tokenizer from a file or the Hub, for `validate`, `test` and `predict`; see `FlexTok.from_pretrained`."""

    def __init__(self, path: str, vae_config: str | None = None) -> None:
        super().__init__()
        self.tokenizer = FlexTok.from_pretrained(path, vae_config=vae_config)

    @property
    def reconstructor(self) -> FlexTok:
        """The tokenizer."""
        return self.tokenizer

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: callbacks measure the metrics by budget."""

    test_step = validation_step

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Tokens of a batch, (B, K) int64, with the samples' keys."""
        return predicted_tokens(self.tokenizer, batch)


class SavedPrior(PriorBase):
    """A prior from a file with the tokenizer of its tokens, for `validate`, `test` and `predict`.

    Args:
        path: see `Prior.from_pretrained`.
        tokenizer: see `FlexTok.from_pretrained`; default the one that the prior's file names.
        text_encoder: replaces the encoder that the prior's file names, for example by a local copy of it.
        other_tokenizer: tokenizer for a prior whose file names none.
    """

    def __init__(
        self,
        path: str,
        tokenizer: str | None,
        text_encoder: str | None = None,
        other_tokenizer: str | None = None,
    ) -> None:
        prior = Prior.from_pretrained(path)
        config, encoder = prior.config, None
        if text_encoder is not None and config.text_width is None:
            raise ValueError(f"text_encoder={text_encoder!r}: this prior takes no text; leave it out")
        if name := text_encoder or config.text_encoder:
            encoder = TextEncoder(name, config.text_length, pad=not config.text_mask)
            if not prior.knows_null:
                prior.set_null_text(encoder.null_states())
        decoder = tokenizer or config.tokenizer_id or other_tokenizer
        super().__init__(prior, decoder, encoder)
        self.tokenizer_name = decoder
