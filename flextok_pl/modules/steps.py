"""What every module's training step needs: its random generator, and checks that stop a run that went wrong."""

from __future__ import annotations

import hashlib

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EMAWeightAveraging
from torch import Tensor

from flextok_pl.contracts import Batch


def step_generator(module: pl.LightningModule, seed: int, batch_idx: int) -> torch.Generator:
    """A generator on the module's device: a pure function of (seed, global step, batch index, rank).

    The batch index tells apart the batches whose gradients one step accumulates.
    """
    position = f"{seed}/{module.global_step}/{batch_idx}/{module.global_rank}"
    digest = hashlib.blake2b(position.encode(), digest_size=8).digest()
    return torch.Generator(module.device).manual_seed(int.from_bytes(digest, "little") >> 1)


def stop_if_not_finite(module: pl.LightningModule, loss: Tensor, batch: Batch) -> None:
    """Stop the training at a loss that is NaN or infinite.

    Raises:
        RuntimeError: it is; the message names the step, the batch's samples and the last checkpoint.
    """
    if torch.isfinite(loss):
        return
    callback = module.trainer.checkpoint_callback
    checkpoint = getattr(callback, "last_model_path", "") or getattr(callback, "best_model_path", "")
    keys = batch.get("key", [])
    shown = ", ".join(keys[:8]) + (f", ... ({len(keys)} in all)" if len(keys) > 8 else "")
    raise RuntimeError(
        f"the loss is {loss.item()} at step {module.global_step} (epoch {module.current_epoch}, rank "
        f"{module.global_rank}); samples of the batch: {shown or 'without keys'}; last good checkpoint: "
        f"{checkpoint or 'none was written yet'}. Look at the samples, or resume from the checkpoint with a lower "
        "learning rate or gradient_clip_val"
    )


def check_averaging(module: pl.LightningModule) -> None:
    """Refuse weight averaging that would end with the initial weights.

    `EMAWeightAveraging` copies its average to the module at the end of a fit, also when it was never updated.

    Raises:
        MisconfigurationException: its first update lies behind the last step.
    """
    total = module.trainer.estimated_stepping_batches
    for callback in module.trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, EMAWeightAveraging) and (callback.update_starting_at_step or 0) >= total >= 0:
            raise MisconfigurationException(
                f"update_starting_at_step={callback.update_starting_at_step} of EMAWeightAveraging is not reached in "
                f"{total} steps, so that the initial weights would be exported; lower it, or remove the callback"
            )


def logging_now(module: pl.LightningModule) -> bool:
    """Whether the trainer writes its logs after the current step."""
    every: int = module.trainer.log_every_n_steps  # type: ignore[attr-defined]
    return (module.global_step + 1) % every == 0


def log_gradient_norm(module: pl.LightningModule) -> None:
    """Log the norm of the whole gradient, before clipping, where the trainer writes its logs."""
    if logging_now(module):
        gradients = [p.grad for p in module.parameters() if p.grad is not None]
        module.log("train/grad_norm", torch.nn.utils.get_total_norm(gradients))
