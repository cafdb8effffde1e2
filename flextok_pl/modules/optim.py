"""The optimizer of all modules: AdamW, parameter groups, clipping and the learning-rate schedule."""

from __future__ import annotations

from collections.abc import Sequence
from math import cos, pi
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.nn.utils import clip_grad_value_, clip_grads_with_norm_
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from flextok_pl.runtime.sharding import gradient_norm

FUSED = ("cpu", "cuda")
"""Types of devices on which AdamW updates all weights in one kernel."""


def adamw(groups: list[dict[str, Any]], lr: float, betas: Sequence[float]) -> AdamW:
    """Make AdamW in one kernel if all weights are on a device that has it, whatever wrote the state that it loads."""
    fused = all(parameter.device.type in FUSED for group in groups for parameter in group["params"])
    optimizer = AdamW(groups, lr=lr, betas=(betas[0], betas[1]), fused=fused or None)

    def keep(optimizer: Optimizer, state: dict[str, Any]) -> None:
        state["param_groups"] = [{**group, "fused": optimizer.defaults["fused"]} for group in state["param_groups"]]

    optimizer.register_load_state_dict_pre_hook(keep)
    return optimizer


def clip_gradients(network: nn.Module, limit: float | None, algorithm: str | None) -> Tensor:
    """Clip a network's gradients by their norm, or each value if `algorithm` is `value`; 0 and None do not clip.

    Returns the norm before clipping, without waiting for it. All processes of a sharded network must call this.
    """
    weights = [parameter for parameter in network.parameters() if parameter.grad is not None]
    if not weights:
        return torch.zeros((), device=next(network.parameters()).device)
    norm = gradient_norm(weights)
    if limit:
        if algorithm == "value":
            clip_grad_value_(weights, limit)
        else:
            clip_grads_with_norm_(weights, limit, norm)
    return norm


def is_matrix(owner: nn.Module, name: str, parameter: nn.Parameter) -> bool:
    """Whether a module's own parameter is the matrix or kernel of a product: (output, input, ...)."""
    return name == "weight" and parameter.ndim > 1 and not isinstance(owner, nn.Embedding)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trainable parameters into groups with and without weight decay; empty groups are left out.

    Matrices and convolution kernels decay. Parameters with a single dimension (biases, gains of norms, mask tokens) do
    not. Neither do embeddings and other parameters outside of matrix products: they are not called `weight`, or an
    `nn.Embedding` owns them.
    """
    decays: dict[nn.Parameter, bool] = {}
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if parameter.requires_grad:
                decays.setdefault(parameter, is_matrix(owner, name, parameter))
    groups: list[dict[str, Any]] = [
        {"params": [each for each in decays if decays[each]], "weight_decay": weight_decay},
        {"params": [each for each in decays if not decays[each]], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


def warmup_cosine(optimizer: Optimizer, warmup_steps: int, total_steps: float, min_ratio: float = 0.0) -> LambdaLR:
    """Linear warm-up to each group's full learning rate, then a cosine to `min_ratio` of it; `step` once per step.

    The first step has 1 / (warmup_steps + 1) of the learning rate, step `warmup_steps` the full one and step
    `total_steps` (the one after the last) `min_ratio` of it. If `total_steps` is infinite or -1, as
    `Trainer.estimated_stepping_batches` may be, the learning rate stays constant after the warm-up.
    """
    if warmup_steps < 0:
        raise ValueError(f"warmup_steps={warmup_steps} must be 0 or more")
    if not 0.0 <= min_ratio <= 1.0:
        raise ValueError(f"min_lr_ratio={min_ratio} must be in [0, 1]")
    endless = total_steps == float("inf") or total_steps < 0
    if not endless and warmup_steps >= total_steps > 0:
        raise MisconfigurationException(
            f"warmup_steps={warmup_steps} must be below the {total_steps} steps of this training; lower "
            "model.warmup_steps, or raise trainer.max_steps"
        )

    def ratio(step: int) -> float:
        if step < warmup_steps:
            return (step + 1) / (warmup_steps + 1)
        if endless:
            return 1.0
        progress = min(1.0, (step - warmup_steps) / max(1, total_steps - warmup_steps))
        return min_ratio + (1.0 - min_ratio) * 0.5 * (1.0 + cos(pi * progress))

    return LambdaLR(optimizer, ratio)
