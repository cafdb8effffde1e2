"""Stage 2: train a prior on the tokens of a finished tokenizer.

Shapes: B batch, K tokens.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, Literal

import torch

from flextok_pl.config import PriorConfig, config_from_dict
from flextok_pl.contracts import Batch, same_maker
from flextok_pl.cost.models import prior_flops
from flextok_pl.models.prior import Prior
from flextok_pl.models.starting import Start
from flextok_pl.models.text import TextEncoder
from flextok_pl.models.token_loss import token_loss
from flextok_pl.modules.export import export
from flextok_pl.modules.prior_base import PriorBase, TokenOutputs
from flextok_pl.modules.starting import StartedModule
from flextok_pl.modules.steps import log_means, step_generator
from flextok_pl.modules.width_transfer import WidthPart, check_base_width, rescale_initial_weights
from flextok_pl.runtime.sharding import gather_for_evaluation, shard, shard_again
from flextok_pl.transfer import send

_CLASS_NAMES = "class_names"
"""Key in a checkpoint for the names of the classes that the prior is trained on."""


class PriorModule(StartedModule, PriorBase):
    """Trains a prior on token shards, or on images that it tokenizes during training.

    The end of a fit exports it to the run's folder (`modules.export`). The file states the hash of the tokenizer, the
    text encoder's name and the class names.

    Args:
        net: configuration of the prior.
        tokenizer: tokenizer of the tokens; needed for batches of images (validation, metrics), not to train on token
            shards.
        text_encoder: for a text prior: `minilm`, or a T5 such as `google/flan-t5-xl`. Checkpoints do not store it. If
            the shards hold text states, it only encodes the empty string.
        text_encoder_dtype: precision of the text encoder: `float32` or `bfloat16`.
        init_from: finished prior whose weights to start from: a `.safetensors` file, a folder or a Hub id. It must fit
            `net`. A training that resumes from a checkpoint does not read it.
        init_parts: parts to take from it: `blocks`, `head`, `class_embedding`, ..., or what is below, such as
            `blocks.0`; None for all. The others are new.
        train: parts of the prior to train, by names as for `init_parts`; None for all. The others are frozen: they have
            no gradient, no weight decay and no average, and must come from `init_from`.
        lr: peak learning rate.
        betas: betas of AdamW.
        weight_decay: weight decay of matrices; embeddings, positions and norms have none.
        warmup_steps: optimizer steps of linear warm-up, followed by a cosine over the rest of the training.
        min_lr_ratio: final learning rate, as a share of `lr`.
        mup_base_width: width at which `lr`, `weight_decay` and initialisation are tuned; muP carries them over to this
            model's width. None for the standard parametrisation.
        label_smoothing: share of a token's probability that is spread over the vocabulary.
        condition_dropout: probability that a sample is trained without its condition, for guidance.
        loss_chunk: positions whose logits are computed at a time; None for all.
        activation_checkpointing: recompute blocks in the backward pass, for less memory.
        compile_blocks: `torch.compile` every Transformer block, and on a GPU the loss between its matrix products, for
            training steps; evaluation runs them as they are.
        seed: seed of the condition dropout, and of what `predict` generates.
    """

    def __init__(
        self,
        net: PriorConfig,
        tokenizer: str | None = None,
        text_encoder: str | None = None,
        text_encoder_dtype: Literal["float32", "bfloat16"] = "float32",
        init_from: str | None = None,
        init_parts: list[str] | None = None,
        train: list[str] | None = None,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.95),
        weight_decay: float = 0.05,
        warmup_steps: int = 100,
        min_lr_ratio: float = 0.01,
        mup_base_width: int | None = None,
        label_smoothing: float = 0.0,
        condition_dropout: float = 0.1,
        loss_chunk: int | None = 512,
        activation_checkpointing: bool = False,
        compile_blocks: bool = False,
        seed: int = 0,
    ) -> None:
        net = config_from_dict(PriorConfig, net) if isinstance(net, Mapping) else net  # from a checkpoint
        for name, value in (("label_smoothing", label_smoothing), ("condition_dropout", condition_dropout)):
            if not 0.0 <= value < 1.0:
                raise ValueError(f"{name}={value} must be in [0, 1)")
        if loss_chunk is not None and loss_chunk < 1:
            raise ValueError(f"loss_chunk={loss_chunk} must be at least 1, or null for all positions at once")
        if mup_base_width is not None:
            check_base_width(mup_base_width, net.head_dim)
        encoder = (
            None
            if text_encoder is None
            else TextEncoder(text_encoder, net.text_length, text_encoder_dtype, pad=not net.text_mask)
        )
        super().__init__(build_prior(net, encoder), tokenizer, encoder)
        self.save_hyperparameters(ignore="net")
        self.hparams["net"] = dataclasses.asdict(net)  # plain types: a checkpoint must load with weights_only
        self.seed = seed
        for part in self.width_parts():
            rescale_initial_weights(part)
        self.check_start()
        self.prior.checkpoint_activations(activation_checkpointing)
        if compile_blocks:
            for block in self.prior.blocks:
                block.compile()

    @property
    def network(self) -> Prior:
        """The prior."""
        return self.prior

    @property
    def flops_per_sample(self) -> float:
        """Floating-point operations of a training step per sample, as MFU counts them; see `flextok_pl.cost.models`.

        Embeddings, the text encoder and its states, and recomputation are not counted.
        """
        return prior_flops(self.prior.config, train=self.trained_parts).training

    def setup(self, stage: str) -> None:
        """Check the data, and record in the prior what it is trained on."""
        super().setup(stage)
        config, data = self.prior.config, self.trainer.datamodule  # type: ignore[attr-defined]
        made_by = getattr(self, "tokenizer_id", None) or getattr(data, "tokenizer", None)
        if made_by is None:
            raise ValueError("these shards hold no tokens: write some (flextok data tokens), or set model.tokenizer")
        names = config.class_names or (getattr(data, "classes", ()) if self.num_classes else ())
        self.prior.trained_on(made_by["sha256"], names)

    def on_start(self, start: Start) -> None:
        """Read from the initial weights which tokenizer and which classes they belong to."""
        own, its = self.prior.config, start.source.config
        assert isinstance(its, PriorConfig)
        taken = {name.partition(".")[0] for name in start.taken}
        tokenizer = its.tokenizer if taken & {"token_embedding", "head"} else ""
        names = its.class_names if "class_embedding" in taken else ()
        self.check_classes(names, f"init_from={self.hparams['init_from']!r}")
        self.prior.trained_on(tokenizer or own.tokenizer, names or own.class_names)
        if self.tokenizer is not None:
            self.check_tokens(f"tokenizer={self.hparams['tokenizer']!r}", self.tokenizer_id)

    def frozen_weights(self) -> dict[str, str]:
        """The hash of the tokenizer, if there is one."""
        return {} if self.tokenizer is None else {"tokenizer": self.tokenizer_id["sha256"]}

    def same_frozen(self, option: str, digest: str) -> bool:
        """Whether a checkpoint has this tokenizer, or one that makes the same tokens."""
        return same_maker(self.tokenizer_id, digest)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the names of the classes."""
        super().on_save_checkpoint(checkpoint)
        checkpoint[_CLASS_NAMES] = list(self.class_names)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the classes are those of the checkpoint."""
        super().on_load_checkpoint(checkpoint)
        names = checkpoint.get(_CLASS_NAMES, ())
        self.check_classes(names, "the checkpoint")
        if names:
            self.prior.trained_on(self.prior.config.tokenizer, names)

    def width_parts(self) -> list[WidthPart]:
        """The prior, as the only part."""
        config, base_width = self.prior.config, self.hparams["mup_base_width"]
        if base_width is None:
            return []
        with torch.device("meta"):
            base = Prior(dataclasses.replace(config, width=base_width))
        return [WidthPart(self.prior, base, base_width / config.width, lambda fan_in, fan_out: 1.0)]

    def configure_model(self) -> None:
        """Shard the prior if the strategy asks for it."""
        shard(self, [self.prior], methods=["hidden"])

    def training_step(self, batch: Batch, batch_idx: int) -> TokenOutputs:
        """Compute the cross-entropy of each token given those before it."""
        tokens, condition, options = self.tokens(batch), self.condition(batch), self.hparams
        generator = step_generator(self, self.seed, batch_idx)
        world_size = self.trainer.world_size
        draws = torch.rand(len(tokens) * world_size, generator=generator)  # of all ranks, whatever their number
        null = send(draws[self.global_rank :: world_size] < options["condition_dropout"], tokens.device)
        hidden, weight = self.prior.hidden(tokens, condition, null), self.prior.head.weight
        compiled = options["compile_blocks"] and hidden.is_cuda
        bias, smoothing, chunk = self.prior.head.bias, options["label_smoothing"], options["loss_chunk"]
        result = token_loss(hidden, weight, tokens, smoothing, chunk, compiled, bias)
        values = {"train/loss": result.loss, "train/bits_per_token": result.nll.mean() / math.log(2)}
        log_means(self, values, len(tokens))
        return {"loss": result.loss, "nll": result.nll, "correct": result.correct}

    def on_validation_epoch_start(self) -> None:
        """Gather all weights on each process."""
        super().on_validation_epoch_start()
        gather_for_evaluation(self)

    def on_validation_epoch_end(self) -> None:
        """Shard the weights again."""
        shard_again(self)
        super().on_validation_epoch_end()

    def on_train_end(self) -> None:
        """Export the prior; averaging callbacks have put their weights in place by now."""
        export(self, "prior")


def build_prior(net: PriorConfig, encoder: TextEncoder | None) -> Prior:
    """Make a new prior that stores the encoder's states of the empty string."""
    if encoder is None or net.text_width is None:
        return Prior(net)
    null_text = encoder.null_states()
    prior = Prior(dataclasses.replace(net, null_text_length=len(null_text), text_encoder=encoder.name))
    prior.set_null_text(null_text)
    return prior
