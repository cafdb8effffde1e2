"""Resumes a training with changed options: applies some changes, and refuses others."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import OptimizerLRScheduler
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flextok_pl.contracts import run_folder
from flextok_pl.modules.optim import adamw, clip_gradients, warmup_cosine
from flextok_pl.modules.steps import logging_now
from flextok_pl.modules.width_transfer import WidthPart, width_groups
from flextok_pl.precision import check_training_precision
from flextok_pl.runtime.finite import StopIfNotFinite
from flextok_pl.runtime.lightning_internals import attached_trainer

APPLIED = ("lr", "betas", "weight_decay", "warmup_steps", "min_lr_ratio", "repa_until")
"""Options whose new values apply when a training resumes."""

WITHOUT_EFFECT = (
    *("activation_checkpointing", "compile_blocks", "loss_chunk", "scale_batches"),
    *("init", "init_from", "init_parts", "started_from", "same_tokens_as"),
)
"""Options that change only how something is computed, or how a training begins."""

EVALUATED = ("net", "vae", "tokenizer", "text_encoder", "text_encoder_dtype", "_class_path")
"""Options that affect an evaluation."""

FROZEN = "frozen_weights"
"""Key in a checkpoint for the hashes of the frozen networks."""


class Change(NamedTuple):
    """An option that differs from a checkpoint's."""

    option: str  # such as `net.position_base`
    before: Any
    now: Any

    @property
    def root(self) -> str:
        """The option of the module that holds it."""
        return self.option.partition(".")[0]

    def __str__(self) -> str:
        return f"model.{self.option} was {self.before!r}, and is {self.now!r} now"


def _changes(given: Mapping[str, Any], checkpoint: Mapping[str, Any], prefix: str = "") -> Iterator[Change]:
    for name in sorted(given.keys() & checkpoint.keys() - {"_instantiator"}):
        now, before = given[name], checkpoint[name]
        if isinstance(now, Mapping) and isinstance(before, Mapping):
            yield from _changes(now, before, f"{prefix}{name}.")
        elif _plain(now) != _plain(before):
            yield Change(f"{prefix}{name}", before, now)


def _plain(value: Any) -> Any:
    return [_plain(each) for each in value] if isinstance(value, Sequence) and not isinstance(value, str) else value


class ResumableModule(pl.LightningModule):
    """A module with AdamW and a schedule that can resume from a checkpoint with changed options.

    Its hyper-parameters include those of AdamW and its schedule, `APPLIED`.
    """

    _changes: Sequence[Change] = ()

    def configure_callbacks(self) -> list[Callback]:
        """Check the trainer's precision, in the first hook that knows it, and add the callbacks of every training."""
        check_training_precision(self.trainer.precision)
        self._finite = StopIfNotFinite()
        return [self._finite]

    def width_parts(self) -> list[WidthPart]:
        """The trained parts, each with its counterpart of the base width; empty without width transfer."""
        return []

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Make parameter groups for AdamW."""
        return width_groups(self, self.hparams["weight_decay"], self.hparams["lr"], self.width_parts())

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """AdamW over parameter groups, with warm-up and cosine per step."""
        options, total = self.hparams, self.trainer.estimated_stepping_batches
        optimizer = adamw(self.optimizer_groups(), options["lr"], options["betas"])
        schedule = warmup_cosine(optimizer, options["warmup_steps"], total, options["min_lr_ratio"])
        names = ("weight_decay", "betas", "eps")
        self._given = [{name: group[name] for name in names} for group in optimizer.param_groups]
        self._base_lrs = list(schedule.base_lrs)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def trained_networks(self) -> list[nn.Module]:
        """The trained networks; each is clipped by its own norm, and the norm of the first is logged."""
        return [self]

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, log the gradient's norm before clipping, and have it checked one step later, so that nothing waits."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        if scaler is not None and optimizer.defaults["fused"]:  # which Lightning leaves to the optimizer
            scaler.unscale_(optimizer)
        norms = [clip_gradients(each, gradient_clip_val, gradient_clip_algorithm) for each in self.trained_networks()]
        if logging_now(self):
            self.log("train/grad_norm", norms[0])
        self._finite.ask(self.trainer, torch.stack(norms).sum())

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Optimizer) -> None:
        """Clear the gradients, under ddp within their buckets: batches that send none would otherwise make new ones."""
        optimizer.zero_grad(set_to_none=not isinstance(self.trainer.strategy, DDPStrategy))

    def on_validation_model_zero_grad(self) -> None:
        """Free the gradients for a validation, except in ddp's buckets, which stay in any case."""
        if not isinstance(self.trainer.strategy, DDPStrategy):
            super().on_validation_model_zero_grad()

    def frozen_weights(self) -> dict[str, str]:
        """Option -> hash of the frozen network that it names; checkpoints do not hold these networks."""
        return {}

    def same_frozen(self, option: str, digest: str) -> bool:
        """Whether an option's frozen network gives the same results as a checkpoint's with another hash."""
        return False

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Store the hashes of the frozen networks."""
        checkpoint[FROZEN] = self.frozen_weights()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse a checkpoint of another model before its weights are loaded."""
        trainer = attached_trainer(self)
        if trainer is not None:
            training = trainer.state.fn == TrainerFn.FITTING
            self._changes = self.accepted_changes(checkpoint, trainer.max_steps if training else None)

    def accepted_changes(
        self, checkpoint: Mapping[str, Any], max_steps: int | None, source: str = "the checkpoint"
    ) -> list[Change]:
        """The changed options that a training accepts when it resumes from a checkpoint.

        Options that only one side has are not compared. `max_steps` is -1 for a training without end, and None
        for an evaluation, which compares only the options in `EVALUATED`.

        Raises:
            ValueError: another difference changes what the model is, or what it learns; or the training has ended.
        """
        now, before = dict(self.hparams), {"train": None, **checkpoint.get("hyper_parameters", {})}
        if FROZEN in checkpoint:  # a file may have moved or changed since
            own = self.frozen_weights()
            now |= {name: f"weights {digest}" for name, digest in own.items()}
            before |= {
                name: f"weights {own[name] if name in own and self.same_frozen(name, digest) else digest}"
                for name, digest in checkpoint[FROZEN].items()
            }
        changes = list(_changes(now, before))
        if max_steps is None:
            accepted, refused = [], [each for each in changes if each.root in EVALUATED]
        else:
            accepted = [each for each in changes if each.root in APPLIED]
            refused = [each for each in changes if each.root not in (*APPLIED, *WITHOUT_EFFECT)]
        if refused:
            anew = "" if max_steps is None else ", or leave out ckpt_path to start a new training"
            raise ValueError(
                f"{source} is of a model with other options: {'; '.join(map(str, refused))}. Give the former ones, as "
                f"the config.yaml of its run has them{anew}"
            )
        if accepted and max_steps is not None and 0 <= max_steps <= checkpoint["global_step"]:
            raise ValueError(
                f"the training of {source} has ended after {checkpoint['global_step']} steps, and takes no other "
                f"options: {'; '.join(map(str, accepted))}. Give the former ones, or raise trainer.max_steps"
            )
        return accepted

    def on_train_start(self) -> None:
        """Apply the given options to optimizer and schedule, which a checkpoint may have restored."""
        schedule: Any = self.trainer.lr_scheduler_configs[0].scheduler
        assert isinstance(schedule, LambdaLR)
        schedule.base_lrs = list(self._base_lrs)
        for group, given, base, law in zip(
            schedule.optimizer.param_groups, self._given, self._base_lrs, schedule.lr_lambdas, strict=True
        ):
            group.update(given, initial_lr=base, lr=base * law(schedule.last_epoch))
        schedule._last_lr = [group["lr"] for group in schedule.optimizer.param_groups]
        self._record_changes()

    def _record_changes(self) -> None:
        """Print the step from which options changed, and append them to the run's `changes.jsonl`."""
        changes, self._changes = self._changes, ()
        if not changes:
            return
        folder = run_folder(self.trainer)
        if self.trainer.is_global_zero:
            folder.mkdir(parents=True, exist_ok=True)
            with (folder / "changes.jsonl").open("a") as lines:
                for change in changes:
                    print(f"from step {self.global_step} on: {change}", flush=True)
                    lines.write(json.dumps({"step": self.global_step, **change._asdict()}) + "\n")
