"""Shared base of trainings of a tokenizer, or of its decoder alone: latents, losses by time and budget, export.

Shapes: B batch, C channels, h x w latent, K registers.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from flextok_pl.contracts import Batch, same_maker
from flextok_pl.models.identity import latents_identity
from flextok_pl.models.objective import TrainingDraws
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.export import export
from flextok_pl.modules.image_grids import Grid, grids_of, trained_on
from flextok_pl.modules.loss_buckets import LossBuckets
from flextok_pl.modules.resume import ResumableModule
from flextok_pl.modules.steps import SampleMeans, log_means, logging_now
from flextok_pl.runtime.lightning_internals import step_ends
from flextok_pl.runtime.sharding import gather_for_evaluation, shard_again


def predicted_tokens(tokenizer: FlexTok, batch: Batch) -> dict[str, Any]:
    """What `flextok predict` writes of a batch of images."""
    if "image" not in batch:
        raise ValueError(f"a tokenizer predicts from images, but data.test gives {sorted(batch)}: use image shards")
    return {"key": batch.get("key"), "tokens": tokenizer.tokenize(batch["image"])}


class TokenizerTraining(ResumableModule):
    """Trains `tokenizer`, or a part of it, on latents of its frozen autoencoder, made in training or stored.

    The end of a fit exports the tokenizer to the run's folder (`modules.export`).
    """

    autoencoder_option: ClassVar[str] = "vae"
    """The option that names the autoencoder."""
    val_means: ClassVar[tuple[str, ...]] = ("val/loss",)
    """Metrics of a validation, as means over its samples."""

    tokenizer: FlexTok
    grid: Grid | None = None  # patches of the data's images, the largest if they have several sizes

    def hold(self, tokenizer: FlexTok) -> None:
        """Take the tokenizer, in the constructor, and prepare its losses by time and by budget."""
        self.tokenizer = tokenizer
        self.train_loss = LossBuckets(tokenizer.num_registers)
        self.val_loss = LossBuckets(tokenizer.num_registers)

    @property
    def network(self) -> FlexTok:
        """The tokenizer."""
        return self.tokenizer

    @property
    def reconstructor(self) -> FlexTok:
        """The tokenizer, with its current weights."""
        return self.tokenizer

    def setup(self, stage: str) -> None:
        """Check that the model takes the image sizes, and that precomputed latents come from its autoencoder."""
        super().setup(stage)
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        grids = grids_of(self.tokenizer.config, data)
        self.grid = max(grids, key=math.prod, default=None)
        if stage == "fit" and grids:
            self.tokenizer.config = trained_on(self.tokenizer.config, grids)
        latents = getattr(data, "autoencoder", None)
        if latents is not None and "sha256" in latents:
            vae, name = latents_identity(self.tokenizer.require_vae()), self.autoencoder_option
            if not same_maker(latents, vae):
                raise ValueError(
                    f"these are latents of autoencoder {latents}, but model.{name}={self.hparams[name]!r} has {vae}: "
                    "set it to the former, or write the latents again (flextok data latents)"
                )

    @torch.no_grad()
    def latents(self, batch: Batch) -> Tensor:
        """Scaled latents (B, C, h, w) of a batch of images or of precomputed moments."""
        vae = self.tokenizer.require_vae()
        if "latent" in batch:
            return vae.scale(batch["latent"])
        if "image" in batch:
            return vae.encode(batch["image"])
        raise ValueError(f"a batch for the tokenizer needs 'image' or 'latent'; these shards give {sorted(batch)}")

    def logged_loss(self, losses: Tensor, draws: TrainingDraws) -> Tensor:
        """Log a training step's losses (B,), also by time and by budget, and return their mean."""
        loss = losses.mean()
        log_means(self, {"train/loss": loss}, len(losses))
        self.train_loss.update(losses, draws)
        if logging_now(self) and step_ends(self):
            self.log_dict(self.train_loss.compute_and_reset("train"), batch_size=len(losses))
        return loss

    def on_validation_epoch_start(self) -> None:
        """Gather all weights on each process."""
        gather_for_evaluation(self)
        self._val_means = SampleMeans(self.val_means, self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the validation loss, also by time and by budget."""
        shard_again(self)
        self._val_means.log(self)
        self.log_dict(self.val_loss.compute_and_reset("val"))

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: callbacks measure the metrics by budget."""

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Tokens of a batch, (B, K) int64, with the samples' keys."""
        return predicted_tokens(self.tokenizer, batch)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the losses, of all processes, that wait for the next log."""
        super().on_save_checkpoint(checkpoint)
        reduce = self.trainer.strategy.reduce
        waiting: dict[str, Any] = self.train_loss.metric_state
        checkpoint["train_loss"] = {n: reduce(value.clone(), reduce_op="sum").cpu() for n, value in waiting.items()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Give them to the first process; the log sums over all."""
        super().on_load_checkpoint(checkpoint)
        if self.global_rank == 0:
            for name, value in checkpoint.get("train_loss", {}).items():
                getattr(self.train_loss, name).copy_(value)

    def on_train_end(self) -> None:
        """Export the tokenizer; averaging callbacks have put their weights in place by now."""
        export(self, "tokenizer")
