"""Stage 3: distil a trained tokenizer's decoder into one that needs few steps.

Special points:
- Only the decoder is trained. Autoencoder, encoder and quantiser are the teacher's, so that tokens do not change:
  priors and token shards of the teacher fit the student.
- The objective, `flextok_pl.models.distillation`, regresses the teacher's guided path from the same noise.
- The export states how it decodes (`FlexTokConfig.num_steps` and so on), so that users need not give it.

Shapes: B batch, C channels, h x w latent, N steps of the student.
"""

from __future__ import annotations

import copy
import dataclasses
from typing import ClassVar

from torch import Tensor

from flextok_pl.config import FlexTokConfig, Guidance, NestedDropoutLaw
from flextok_pl.contracts import Batch
from flextok_pl.cost.models import distillation_flops
from flextok_pl.flow.decoding import Decoding
from flextok_pl.layers.blocks import compile_for_all_lengths
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models.distillation import (
    States,
    Windows,
    check_steps,
    distillation_loss,
    teacher_decoding,
    training_law,
)
from flextok_pl.models.identity import makers_of_the_same
from flextok_pl.models.objective import TrainingDraws, draws_of_each, sample_draws
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.steps import evaluation_generators, step_generator
from flextok_pl.modules.tokenizer_base import TokenizerTraining
from flextok_pl.precision import full_precision
from flextok_pl.runtime.sharding import shard


class DistillationModule(TokenizerTraining):
    """Trains a decoder to make in a few steps without guidance what its teacher makes in many with guidance.

    The student starts as a copy of the teacher. The rest of the tokenizer is frozen: neither optimized nor averaged.
    Batches carry images, or latents of the tokenizer's autoencoder. The result decodes best in `num_steps` steps, the
    default of its file. For another number train another student, which may have this one as its teacher.

    Args:
        tokenizer: the teacher, a finished tokenizer: a `.safetensors` file, a folder or a Hub id.
        num_steps: steps of the student, such as 1, 2 or 4; they must divide the teacher's.
        teacher_steps: steps of the teacher; null for its own setting, or else 25.
        guidance: guidance of the teacher: `none`, `cfg` or `apg`; null for its own, or else `apg`. The student learns
            the guided path.
        guidance_scale: guidance scale of the teacher; null for its own, or else 7.5.
        guidance_interval: flow times (low, high] at which the teacher is guided; null for all, [0, 1].
        solver: solver of the teacher: `euler` or `heun`.
        states: where the student learns its later steps: at states that it has reached itself (`student`), or at the
            teacher's.
        nested_dropout: law of the number of tokens; null for that of the teacher's training. `pow2` trains short
            budgets as often as long ones.
        stratified_budgets: draw numbers of tokens in equal strata over the batch; see `TokenizerModule`.
        lr: peak learning rate.
        betas: betas of AdamW.
        weight_decay: weight decay of matrices; biases, tokens and positions have none.
        warmup_steps: optimizer steps of linear warm-up, followed by a cosine over the rest of the training.
        min_lr_ratio: final learning rate, as a share of `lr`.
        activation_checkpointing: recompute blocks in the backward pass, for less memory; else those of all N steps are
            kept.
        compile_blocks: `torch.compile` every block of the student for training steps.
        seed: seed of noise and budgets in training, and of the fixed ones in validation.
    """

    autoencoder_option: ClassVar[str] = "tokenizer"

    def __init__(
        self,
        tokenizer: str,
        num_steps: int = 4,
        teacher_steps: int | None = None,
        guidance: Guidance | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] | None = None,
        solver: str = "euler",
        states: States = "student",
        nested_dropout: NestedDropoutLaw | None = None,
        stratified_budgets: bool = True,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.99),
        weight_decay: float = 0.0,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.01,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.save_hyperparameters()
        network = FlexTok.from_pretrained(tokenizer)
        if network.config.objective == "mse":
            raise ValueError(f"tokenizer={tokenizer!r} has objective='mse' and decodes in one step already")
        self.decoding = teacher_decoding(network.config, self.hparams)
        check_steps(num_steps, self.decoding.num_steps)
        self.num_steps, self.states, self.seed = num_steps, states, seed
        identity = network.identity()
        self._hash = identity["model_sha256"]
        self.teacher = Frozen(copy.deepcopy(network.decoder))
        network.vae = Frozen(network.require_vae())
        network.encoder.requires_grad_(False)
        student = student_config(network.config, num_steps, self.decoding, f"{tokenizer} ({self._hash})")
        network.config = dataclasses.replace(student, same_tokens_as=tuple(makers_of_the_same(identity)))
        self.law = training_law(network.config, nested_dropout)
        network.decoder.activation_checkpointing = activation_checkpointing
        if compile_blocks:
            compile_for_all_lengths(network.decoder.blocks)
        self.hold(network)

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of a training step per image, as MFU counts them: those of the student's steps."""
        return distillation_flops(self.law, self.num_steps).training

    def configure_model(self) -> None:
        """Shard the student if the strategy asks for it."""
        shard(self, [self.tokenizer.decoder])

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """Compute the errors of the student's steps against the teacher's windows."""
        latents = self.latents(batch)
        generator = step_generator(self, self.seed, batch_idx)
        stratified, process = self.hparams["stratified_budgets"], (self.global_rank, self.trainer.world_size)
        draws = sample_draws(self.law, latents, generator, 1.0, 0.0, stratified, *process)
        return self.logged_loss(*flattened(self._windows(latents, draws), draws))

    def _windows(self, latents: Tensor, draws: TrainingDraws) -> Windows:
        teacher = self.teacher.module
        return distillation_loss(self.tokenizer, teacher, latents, draws, self.decoding, self.num_steps, self.states)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compute the same errors with fixed draws for each image, in float32."""
        with full_precision(self.device):
            latents = self.latents(batch)
            draws = draws_of_each(self.law, latents, evaluation_generators(self.seed, batch))
            losses, of_windows = flattened(self._windows(latents, draws), draws)
        self._val_means.add({"val/loss": losses.mean()}, len(latents))
        self.val_loss.update(losses, of_windows)

    def frozen_weights(self) -> dict[str, str]:
        """The hash of the teacher."""
        return {"tokenizer": self._hash}


def student_config(teacher: FlexTokConfig, num_steps: int, decoding: Decoding, source: str) -> FlexTokConfig:
    """The teacher's configuration with the decoding of the student, and a note of what it was distilled from."""
    note = f"{source}: its {decoding.num_steps} steps, {decoding.guidance} {decoding.guidance_scale}"
    return dataclasses.replace(teacher, num_steps=num_steps, guidance="none", guidance_scale=1.0, started_from=note)


def flattened(windows: Windows, draws: TrainingDraws) -> tuple[Tensor, TrainingDraws]:
    """Flatten the losses of all windows to (B N,), and the draws, with the middle of each window as its time."""
    count = len(windows.times)
    parts = (each.repeat_interleave(count) for each in (draws.num_tokens, draws.null))
    return windows.loss.flatten(), TrainingDraws(draws.noise, windows.times.repeat(len(draws.t)), *parts)
