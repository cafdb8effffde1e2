"""A finished tokenizer in Lightning's clothes, so that it can be evaluated without the experiment that trained it."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from flextok_pl.contracts import Batch
from flextok_pl.models.tokenizer import FlexTok


class SavedTokenizer(pl.LightningModule):
    """A tokenizer from a file or the Hub, for `validate`, `test` and `predict`.

    Args:
        path: see `FlexTok.from_pretrained`.
        vae_config: likewise.

    Raises:
        ValueError: the checkpoint is missing, damaged or not supported.
    """

    def __init__(self, path: str, vae_config: str | None = None) -> None:
        super().__init__()
        self.tokenizer = FlexTok.from_pretrained(path, vae_config=vae_config)

    @property
    def reconstructor(self) -> FlexTok:
        """The tokenizer."""
        return self.tokenizer

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing of its own: metrics per budget are the callbacks' work."""

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Nothing of its own, likewise."""

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Tokens of a batch, (B, K) int64, with the samples' keys."""
        return {"key": batch.get("key"), "tokens": self.tokenizer.tokenize(batch["image"])}
