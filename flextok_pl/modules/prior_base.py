"""Shared base of priors in training and finished priors: tokens, conditions, validation, generation.

Shapes: B batch, K tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypedDict

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor

from flextok_pl.contracts import Batch, PositionScale, class_difference, same_maker
from flextok_pl.layers.frozen import Frozen
from flextok_pl.models.prior import Condition, Prior, TextStates
from flextok_pl.models.text import TextEncoder
from flextok_pl.models.token_loss import token_loss
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.modules.steps import SampleMeans, evaluation_generators
from flextok_pl.precision import full_precision


class TokenOutputs(TypedDict):
    """The outputs of a step, for callbacks."""

    loss: Tensor  # scalar
    nll: Tensor  # (B, K) nats per token
    correct: Tensor  # (B, K) bool, whether the token was the most likely one


class PriorBase(pl.LightningModule):
    """A prior with the tokenizer that decodes its tokens and its text encoder, both frozen.

    `tokenizer` is a `.safetensors` file, folder or Hub id, or None to work without images; `encoder` is for a text
    prior. Both stay on the CPU until images or texts need them. They return to it when the trainer is done, and after
    each validation of a training whose shards hold their outputs.
    """

    seed = 0  # of all draws

    def __init__(self, prior: Prior, tokenizer: str | None, encoder: TextEncoder | None) -> None:
        super().__init__()
        self.prior = prior
        self.text_encoder = None if encoder is None else Frozen(encoder, follows=False)
        self.tokenizer: Frozen[FlexTok] | None = None
        if (prior.config.text_width is None) != (encoder is None):
            name = None if encoder is None else encoder.name
            raise ValueError(
                f"text_encoder={name!r} and net.text_width={prior.config.text_width}: a text prior needs both, any "
                "other neither"
            )
        if tokenizer is not None:
            network = FlexTok.from_pretrained(tokenizer)
            self.tokenizer = Frozen(network, follows=False)
            self.tokenizer_id = network.identity()
            self.check_tokens(f"tokenizer={tokenizer!r}", self.tokenizer_id)

    def setup(self, stage: str) -> None:
        """Check that tokens, classes and text states of the shards fit the prior."""
        data = self.trainer.datamodule  # type: ignore[attr-defined]
        source, encoder = getattr(data, "tokenizer", None), getattr(data, "text_encoder", None)
        if source is not None:
            self.check_tokens("the set of token shards", source)
        if self.condition_kind == "class" and hasattr(data, "require_same_classes"):
            data.require_same_classes()
        self.check_classes(getattr(data, "classes", ()), "the shards")
        if encoder is not None and self.text_encoder is not None and encoder["name"] != self.text_encoder.name:
            raise ValueError(
                f"the shards hold text states of {encoder['name']!r}, but text_encoder={self.text_encoder.name!r}; set "
                "model.text_encoder to the former, or write the shards without states"
            )
        if encoder is not None and not self.prior.config.text_mask:
            raise ValueError(
                "the shards hold text states without padding, but net.text_mask=false lets the prior attend to the "
                "padding's: write the shards without states (no --text_encoder)"
            )

    def check_classes(self, classes: Sequence[str], source: str) -> None:
        """Check that a source, named in errors, numbers its classes as the prior does, if either has classes."""
        if not classes or self.condition_kind != "class":
            return
        if len(classes) != self.num_classes:
            raise ValueError(
                f"num_classes={self.num_classes} of the prior, but {len(classes)} classes in {source}; set "
                f"model.net.num_classes={len(classes)} to train on them, or give data with the prior's classes"
            )
        difference = class_difference(self.class_names, classes) if self.class_names else None
        if difference is not None:
            raise ValueError(
                f"the prior and {source} differ in classes: {difference}. Write the set again with the prior's classes "
                "(flextok data folder --classes), or train another prior on it"
            )

    def check_tokens(self, source: str, made_by: Mapping[str, Any]) -> None:
        """Check that a source, named in errors, has tokens of the prior's tokenizer, if that is known."""
        config = self.prior.config
        for name in ("vocab_size", "num_tokens"):
            if made_by[name] != getattr(config, name):
                raise ValueError(
                    f"{name}={getattr(config, name)} of the prior, but {source} has {made_by[name]}; give "
                    f"the tokenizer of the prior's tokens, or train a prior with model.net.{name}={made_by[name]}"
                )
        own: Mapping[str, Any] | None = getattr(self, "tokenizer_id", None)
        known = config.tokenizer or (own or made_by)["sha256"]
        # Shards of an earlier version share no hash with a prior of today, but the tokenizer has both hashes.
        linked = own is not None and same_maker(own, known) and same_maker(own, made_by)
        if not linked and not same_maker(made_by, known):
            raise ValueError(
                f"{source} belongs to tokenizer {made_by['sha256']}, the prior to tokenizer {known}, and tokens fit "
                "only their own tokenizer. Give the one that made the prior's tokens, or write the tokens again "
                "(flextok data tokens) and train on them"
            )

    @property
    def reconstructor(self) -> FlexTok:
        """The tokenizer, to decode generated tokens; moves it to the prior's device."""
        if self.tokenizer is None:
            raise MisconfigurationException("images need a tokenizer: set model.tokenizer (or --tokenizer)")
        return self.tokenizer.on(self.device)

    @property
    def condition_kind(self) -> Literal["class", "text", "none"]:
        """The kind of condition of the prior."""
        if self.text_encoder is not None:
            return "text"
        return "class" if self.prior.config.num_classes else "none"

    @property
    def num_classes(self) -> int:
        """Number of classes; 0 for other conditions."""
        return self.prior.config.num_classes

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, or empty."""
        return self.prior.config.class_names

    def generate_tokens(
        self,
        condition: Tensor | Sequence[str] | None,
        cfg_scale: PositionScale = 1.0,
        temperature: float = 1.0,
        top_k: int | None = None,
        top_p: float | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
    ) -> Tensor:
        """Generate all K tokens, (B, K), for (B,) classes (-1 for none), B texts or None; see `Prior.generate`."""
        given = self.encoded_condition(condition)
        return self.prior.generate(given, None, cfg_scale, temperature, top_k, top_p, prefix=None, generator=generator)

    @torch.no_grad()
    def encoded_condition(self, condition: Tensor | Sequence[str] | None) -> Condition:
        """Make the prior's input for (B,) classes (-1 for none), B texts or None, on its device."""
        if condition is None:
            return None
        if isinstance(condition, Tensor):
            return condition.to(self.device)
        with full_precision(self.device):
            return self._encode(condition, truncate=False)

    @torch.no_grad()
    def tokens(self, batch: Batch) -> Tensor:
        """Tokens (B, K) of a batch: its own, or those of its images."""
        if "tokens" in batch:
            return batch["tokens"]
        if "image" not in batch:
            raise ValueError(f"a batch for the prior needs 'tokens' or 'image'; these shards give {sorted(batch)}")
        tokenizer = self.reconstructor
        with full_precision(self.device):
            return tokenizer.tokenize_latents(tokenizer.require_vae().encode(batch["image"]))

    @torch.no_grad()
    def condition(self, batch: Batch) -> Condition:
        """The condition of each sample of a batch."""
        if self.condition_kind == "none":
            return None
        if self.condition_kind == "class":
            if "label" not in batch:
                raise ValueError(
                    f"a prior of {self.num_classes} classes needs labels; these shards give {sorted(batch)}: use "
                    "pictures in class folders, or set model.net.num_classes to 0"
                )
            return batch["label"]
        if "text_states" in batch:
            return TextStates(batch["text_states"], batch["text_mask"])
        if "text" not in batch:
            raise ValueError(f"a text prior needs captions; these shards give {sorted(batch)}")
        return self._encode(batch["text"], truncate=True)

    def _encode(self, texts: Sequence[str], truncate: bool) -> TextStates:
        assert self.text_encoder is not None
        states: TextStates = self.text_encoder.on(self.device)(texts, truncate)
        return states

    def on_validation_epoch_start(self) -> None:
        """Start the sums of the epoch."""
        gap = [] if self.condition_kind == "none" else ["val/condition_gap"]
        self._val_means = SampleMeans(["val/loss", "val/bits_per_token", "val/accuracy", *gap], self.device)

    def on_validation_epoch_end(self) -> None:
        """Log the means over all samples."""
        self._val_means.log(self)

    def on_validation_end(self) -> None:
        """Move to the CPU what the training does not use; metrics have used it by now."""
        for name, network in (("tokenizer", self.tokenizer), ("text_encoder", self.text_encoder)):
            made = getattr(self.trainer.datamodule, name, None) is not None  # type: ignore[attr-defined]
            if network is not None and made:
                network.on("cpu")

    def teardown(self, stage: str) -> None:
        """Move everything to the CPU, as the trainer does with the prior."""
        for network in (self.tokenizer, self.text_encoder):
            if network is not None:
                network.on("cpu")

    def validation_step(self, batch: Batch, batch_idx: int) -> TokenOutputs:
        """Compute the loss with and without the condition, in float32."""
        weight, bias = self.prior.head.weight, self.prior.head.bias
        with full_precision(self.device):
            tokens, condition = self.tokens(batch), self.condition(batch)
            own = token_loss(self.prior.hidden(tokens, condition), weight, tokens, bias=bias)
            values = {"val/loss": own.loss, "val/bits_per_token": own.loss / math.log(2)}
            values["val/accuracy"] = own.correct.float().mean()
            if condition is not None:
                null = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
                without = token_loss(self.prior.hidden(tokens, condition, null), weight, tokens, bias=bias)
                values["val/condition_gap"] = without.loss - own.loss
        self._val_means.add(values, len(tokens))
        return {"loss": own.loss, "nll": own.nll, "correct": own.correct}

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        """Do nothing: callbacks measure the metrics by budget."""

    def predict_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        """Generate tokens, (B, K) int64, for a batch's conditions; the samples' keys, also returned, seed them."""
        generators = evaluation_generators(self.seed, batch)
        return {"key": batch["key"], "tokens": self.prior.generate(self.condition(batch), generator=generators)}
