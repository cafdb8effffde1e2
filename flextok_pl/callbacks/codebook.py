"""How much of the codebook a tokenizer uses, and how much each token position says."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from torch import Tensor

from flextok_pl.callbacks.evaluation import batch_images, log_evaluation, module_reconstructor
from flextok_pl.metrics.codes import codebook_use, distinct_tokens, perplexity, position_entropy
from flextok_pl.metrics.distributed import gather_rows
from flextok_pl.metrics.images import figure_to_image


class CodebookReport(Callback):
    """Log the use of the codebook over a validation set.

    Scalars: `val/codes/distinct`, `val/codes/use` (fraction of the vocabulary, where the tokenizer's config states it),
    `val/codes/perplexity`, `val/codes/entropy` (bits per token, mean over positions); to TensorBoard also a picture of
    the entropy by position. Only the encoder runs, while batches are evaluated, so averaged weights are seen.

    Args:
        every_n_epochs: during a fit, report in the validations of every n-th epoch.
        max_batches: batches per process to look at; null for all.

    Raises:
        ValueError: an option is out of range.
    """

    def __init__(self, every_n_epochs: int = 1, max_batches: int | None = None) -> None:
        for name, value in (("every_n_epochs", every_n_epochs), ("max_batches", max_batches)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.every_n_epochs, self.max_batches = every_n_epochs, max_batches
        self.values: dict[str, float] = {}
        """Tag -> value of the latest report."""
        self._tokens: list[Tensor] = []
        self._due = False

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a module without tokens before time is spent on it."""
        module_reconstructor(pl_module)

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Forget the tokens of the validation before."""
        self._tokens = []
        self._due = not trainer.sanity_checking and (trainer.current_epoch + 1) % self.every_n_epochs == 0

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Tokenize one batch."""
        if self._due and (self.max_batches is None or batch_idx < self.max_batches):
            images, _ = batch_images(batch, dataloader_idx)
            with trainer.precision_plugin.forward_context():
                self._tokens.append(module_reconstructor(pl_module).tokenize(images).cpu())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report on the tokens of all processes."""
        if not self._due:
            return
        reconstructor = module_reconstructor(pl_module)
        mine = torch.cat(self._tokens) if self._tokens else torch.zeros(0, reconstructor.num_registers).long()
        tokens = gather_rows(mine, trainer.strategy.root_device)  # (N, K)
        if len(tokens) == 0:
            return
        entropy = position_entropy(tokens)
        vocab_size = getattr(getattr(reconstructor, "config", None), "vocab_size", None)
        self.values = {
            "val/codes/distinct": float(distinct_tokens(tokens)),
            "val/codes/perplexity": perplexity(tokens),
            "val/codes/entropy": float(entropy.mean()),
        }
        if vocab_size is not None:
            self.values["val/codes/use"] = codebook_use(tokens, vocab_size)
        picture = plot_entropy(entropy, len(tokens), vocab_size)
        log_evaluation(trainer, pl_module, self.values, {"val/codes/entropy_by_position": picture}, None)


def plot_entropy(entropy: Tensor, num_samples: int, vocab_size: int | None) -> Tensor:
    """Draw the entropy of each position under the largest that could be seen.

    Args:
        entropy: (K,) bits.
        num_samples: N that it was estimated from.
        vocab_size: V, where known.

    Returns:
        (3, H, W) uint8.
    """
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.add_subplot()
    axes.bar(range(1, len(entropy) + 1), entropy.tolist(), width=1.0, edgecolor="white", linewidth=0.3)
    limit = min(num_samples, vocab_size or num_samples)
    axes.axhline(float(np.log2(limit)), color="gray", linestyle="--")
    axes.set_title(f"{num_samples} images; dashed: log2 {limit}, the most that could be seen", fontsize=9)
    axes.set_xlabel("token position")
    axes.set_ylabel("entropy (bits)")
    return figure_to_image(figure)
