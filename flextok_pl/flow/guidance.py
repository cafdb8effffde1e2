"""Guidance: how the conditional and the unconditional velocity make one.

Shapes: velocities are (B, C, h, w).
"""

import math

import torch
from torch import Tensor

from flextok_pl.contracts import GuidanceScale
from flextok_pl.flow.integrate import VelocityField
from flextok_pl.precision import accumulation_dtype

GUIDANCE_KINDS = ("none", "cfg", "apg")


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """U + s * (c - u) (https://arxiv.org/abs/2207.12598, equation 6 with s = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


class AdaptiveProjectedGuidance:
    """Adaptive projected guidance (https://arxiv.org/abs/2410.02416, algorithm 1); one object per sampling run.

    Differs from the paper in working on velocities, not on predictions of the clean sample, as the official
    FlexTok code does; the momentum buffer is kept without the clipping.

    Args:
        momentum: factor of the previous steps' difference.
        eta: share of the component parallel to the conditional velocity that is kept.
        norm_threshold: largest L2 norm of the difference, over one sample's (C, h, w).
    """

    def __init__(self, momentum: float = -0.5, eta: float = 0.0, norm_threshold: float = 2.5) -> None:
        self.momentum = momentum
        self.eta = eta
        self.norm_threshold = norm_threshold
        self._average: Tensor | float = 0.0

    def __call__(self, conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
        """The guided velocity of the next step."""
        self._average = conditional - unconditional + self.momentum * self._average
        difference = self._average
        if self.norm_threshold > 0:
            norm = difference.flatten(1).norm(dim=1)
            clip = (self.norm_threshold / norm).clamp(max=1.0)
            difference = difference * clip.view(-1, 1, 1, 1)
        wide = accumulation_dtype(conditional.device)
        direction = torch.nn.functional.normalize(conditional.to(wide).flatten(1), dim=1).view_as(conditional)
        product = (difference.to(wide) * direction).flatten(1).sum(1).view(-1, 1, 1, 1)
        parallel = (product * direction).to(difference.dtype)
        return conditional + (scale - 1) * (difference - parallel + self.eta * parallel)


def guided_field(
    conditional: VelocityField, unconditional: VelocityField, kind: str, scale: GuidanceScale
) -> VelocityField:
    """One velocity field made of two, for one sampling run.

    Args:
        conditional: the field given the condition.
        unconditional: the field without; not asked where it has no effect.
        kind: one of `GUIDANCE_KINDS`.
        scale: strength; 1 is no guidance.

    Raises:
        ValueError: when the field is asked, the scale is NaN or infinite.
    """
    if kind == "none" or scale == 1.0:
        return conditional
    combine = AdaptiveProjectedGuidance() if kind == "apg" else classifier_free_guidance

    def field(x: Tensor, t: float) -> Tensor:
        strength = scale(t) if callable(scale) else scale
        if not math.isfinite(strength):
            raise ValueError(f"guidance_scale={strength} at t={t} must be a finite number")
        return combine(conditional(x, t), unconditional(x, t), strength)

    return field
