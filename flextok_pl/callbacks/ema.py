"""An exponential moving average of the weights."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from flextok_pl.runtime.lightning_internals import step_ends
from flextok_pl.runtime.sharding import CURRENT_STATE


class EMA(Callback):
    """Average the trained weights, evaluate and export the average, and keep it in checkpoints.

    The module holds the average during a validation, and from the end of a fit on. A checkpoint's `state_dict` is the
    average, so that it loads the weights that were evaluated; `current_model_state` holds the weights in training.
    Lightning's `EMAWeightAveraging` writes the same, but deep-copies the whole module, which fails for a sharded one.

    Args:
        decay: share of the average that an update keeps; the first update copies the weights.
        update_every_n_steps: optimizer steps between updates.
        update_starting_at_step: optimizer step after which the first update comes; until then the average holds the
            initial weights of the training.
    """

    def __init__(self, decay: float = 0.999, update_every_n_steps: int = 1, update_starting_at_step: int = 0) -> None:
        if not 0.0 <= decay < 1.0:
            raise ValueError(f"decay={decay} must be in [0, 1)")
        if update_every_n_steps < 1:
            raise ValueError(f"update_every_n_steps={update_every_n_steps} must be at least 1")
        if update_starting_at_step < 0:
            raise ValueError(f"update_starting_at_step={update_starting_at_step} must be at least 0")
        self.decay = decay
        self.update_every_n_steps, self.update_starting_at_step = update_every_n_steps, update_starting_at_step
        self.num_updates, self.in_place = 0, False  # updates so far; whether the module holds the average now
        self._weights: dict[str, Tensor] | None = None  # the average; the weights in training while that is in place

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forget an earlier fit."""
        if stage == "fit":
            self.num_updates, self.in_place, self._weights = 0, False, None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start from the module's weights, or from a checkpoint's average."""
        total = trainer.estimated_stepping_batches
        start, every = self.update_starting_at_step, self.update_every_n_steps
        first = -(-start // every) * every
        if first >= total >= 0:
            raise MisconfigurationException(
                f"ema.update_starting_at_step={start} and update_every_n_steps={every} put the first update at step "
                f"{first}, but the last step is {total - 1}, so that the initial weights would be exported; lower one "
                "of them, or set ema to null"
            )
        given = self._weights or {}
        self._weights = {
            name: given[name].to(weight.device) if name in given else weight.clone()
            for name, weight in _trained(pl_module)
        }

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Update the average after an optimizer step."""
        step = trainer.global_step - 1
        if not step_ends(pl_module) or step < self.update_starting_at_step or step % self.update_every_n_steps:
            return
        average, weights = self._pairs(pl_module)
        if self.num_updates:
            torch._foreach_lerp_(average, weights, 1.0 - self.decay)
        else:
            torch._foreach_copy_(average, weights)
        self.num_updates += 1

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """In a fit, put the average in place; at the end of the epoch the training weights come back."""
        if trainer.state.fn == TrainerFn.FITTING:
            self._swap(pl_module)

    on_validation_epoch_end = on_validation_epoch_start

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the average in the module, which exports it."""
        self._swap(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """The count; `on_save_checkpoint` stores the weights."""
        return {"num_updates": self.num_updates}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the count."""
        self.num_updates = state_dict["num_updates"]

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Make the average the checkpoint's weights."""
        if self._weights is None:
            return
        state = checkpoint["state_dict"]
        sharded = any(isinstance(value, DTensor) for value in state.values())
        kept = {name: value if sharded else _whole(value) for name, value in self._weights.items()}
        other = state | kept if state else {}  # ranks that do not write may have none
        average, weights = (state, other) if self.in_place else (other, state)
        checkpoint["state_dict"], checkpoint[CURRENT_STATE] = average, weights

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """In a fit, take the average, which the module has loaded, and put the training weights in its place."""
        if trainer.state.fn != TrainerFn.FITTING:
            return
        self._weights = {name: weight.clone() for name, weight in _trained(pl_module)}
        if CURRENT_STATE not in checkpoint:
            warnings.warn("the checkpoint holds no average: averaging starts from its weights", stacklevel=2)
            return
        state = checkpoint[CURRENT_STATE]
        whole = not any(isinstance(value, DTensor) for value in state.values())
        set_model_state_dict(pl_module, state, options=StateDictOptions(full_state_dict=whole))

    def _pairs(self, pl_module: LightningModule) -> tuple[list[Tensor], list[Tensor]]:
        """The stored tensors and those of the module, as local parts, in the same order."""
        assert self._weights is not None
        held = dict(_trained(pl_module))
        return [_local(value) for value in self._weights.values()], [_local(held[name]) for name in self._weights]

    def _swap(self, pl_module: LightningModule) -> None:
        for kept, held in zip(*self._pairs(pl_module), strict=True):
            before = kept.clone()
            kept.copy_(held)
            held.copy_(before)
        self.in_place = not self.in_place


def _trained(module: LightningModule) -> Iterator[tuple[str, Tensor]]:
    """Name and value of each trained parameter; gathered ones are sharded again first."""
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.reshard()
    return ((name, parameter.detach()) for name, parameter in module.named_parameters() if parameter.requires_grad)


def _local(tensor: Tensor) -> Tensor:
    """The part of a sharded tensor that this process holds."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered on the CPU; all processes must call this."""
    return tensor.full_tensor().cpu() if isinstance(tensor, DTensor) else tensor
