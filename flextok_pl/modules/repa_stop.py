"""Stops REPA after a share of the training.

Alignment with a teacher helps early and can hold the model back later, according to HASTE
(https://arxiv.org/abs/2505.16792). HASTE leaves it out from a fixed step on, by default the 250,000th of its training
script for SiT-XL/2. Here the step is a share of the training. The other half of HASTE, the alignment of attention maps,
is not implemented.

Shapes: D decoder width.
"""

from __future__ import annotations

from torch import Tensor, nn


def check_share(repa_until: float) -> None:
    """Raise ValueError for a number that is not a share of a training."""
    if not 0.0 < repa_until <= 1.0:
        raise ValueError(
            f"repa_until={repa_until} must be a share of the training in (0, 1]; for no alignment at all set "
            "model.teacher to null"
        )


def aligned_steps(repa_until: float, total_steps: float) -> float:
    """The number of training steps with alignment: at least one, and all of them at a share of 1.

    `total_steps` is `Trainer.estimated_stepping_batches`: infinite or -1 for a training without end.
    """
    if repa_until == 1.0:
        return float("inf")
    if total_steps == float("inf") or total_steps < 0:
        raise ValueError(
            f"repa_until={repa_until} is a share of the training, and this one has no end: set trainer.max_steps, or "
            "model.repa_until to 1.0"
        )
    return max(1, round(repa_until * total_steps))


def without_alignment(projection: nn.Module, patch_features: Tensor) -> Tensor:
    """Zero, with zero gradients for the projection's weights and none for anything else.

    DDP waits for a gradient of each parameter, so the projection still runs, on one position of zeros.
    """
    nothing = patch_features.new_zeros(1, 1, patch_features.shape[-1])  # (1, 1, D)
    return 0.0 * projection(nothing, (1, 1)).sum()  # type: ignore[no-any-return]
