"""Decode noise into latents: solvers of the flow, guidance, and their options.

Shapes: states x and velocities are (B, C, h, w).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, get_args

import torch
from torch import Tensor

from flextok_pl.config import Guidance
from flextok_pl.config.checks import as_tuples
from flextok_pl.contracts import GuidanceScale, is_whole
from flextok_pl.precision import accumulation_dtype

VelocityField = Callable[[Tensor, float], Tensor]  # (x, t) -> dx/dt at time t, of x's shape
GuidedField = Callable[[Tensor, float, bool], tuple[Tensor, Tensor | None]]
"""(x, t, guided) -> dx/dt with the condition and, if guided, without it."""
SOLVERS = ("euler", "heun")
GUIDANCE_KINDS = get_args(Guidance)
EVERYWHERE = (0.0, 1.0)
"""The interval of all flow times."""


@dataclass(frozen=True)
class Decoding:
    """The options of one decoding; the defaults are those of the published models.

    Args:
        num_steps: steps of the solver.
        guidance: `none`, `cfg` (classifier-free), or `apg` (adaptive projected guidance).
        guidance_scale: strength of the guidance; 1 turns it off.
        solver: `euler`, or `heun`, which is of second order and takes about twice the work.
        guidance_interval: (low, high]: guide only at flow times t with low < t <= high, where 1 is noise and 0 is data.
            At other times the decoder runs on the tokens only, for half of the work.

    Raises:
        ValueError: an option is out of range or unknown.
    """

    num_steps: int = 25
    guidance: str = "apg"  # one of `GUIDANCE_KINDS`
    guidance_scale: GuidanceScale = 7.5
    solver: str = "euler"  # one of `SOLVERS`
    guidance_interval: tuple[float, float] = EVERYWHERE

    def __post_init__(self) -> None:
        interval = self.guidance_interval
        if not isinstance(interval, Sequence) or len(interval) != 2 or not 0 <= interval[0] < interval[1] <= 1:
            raise ValueError(
                f"guidance_interval={interval} must be two flow times, 0 <= low < high <= 1; (0, 1) guides at all times"
            )
        as_tuples(self, "guidance_interval")
        if not is_whole(self.num_steps) or self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be a whole number of at least 1")
        for name, known in (("guidance", GUIDANCE_KINDS), ("solver", SOLVERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")

    @property
    def facts(self) -> dict[str, Any]:
        """The options as a record states them; the interval only if it is not all times."""
        return {name: value for name, value in asdict(self).items() if (name, value) != _ALWAYS}

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for `Reconstructor.detokenize`, without a solver or interval that is the default."""
        return {name: value for name, value in self.facts.items() if (name, value) != ("solver", "euler")}

    def under(self, objective: str) -> Decoding:
        """The decoding of a tokenizer of this objective: `mse` takes a single step without guidance."""
        return ONE_STEP if objective == "mse" else self

    def calls(self) -> tuple[int, int]:
        """How often decoding an image runs the network: with its tokens, and without a condition."""
        conditional = unconditional = 0

        def field(x: Tensor, t: float, guided: bool) -> tuple[Tensor, Tensor | None]:
            nonlocal conditional, unconditional
            conditional, unconditional = conditional + 1, unconditional + guided
            return x, x if guided else None

        self.sample(field, torch.ones(1, 1, 1, 1))
        return conditional, unconditional

    def sample(self, field: GuidedField, noise: Tensor) -> Tensor:
        """Follow the guided velocity from noise to latents."""
        return integrate(self.guided(field), noise, self.num_steps, self.solver)

    def guided(self, field: GuidedField) -> VelocityField:
        """The velocity of one trajectory; `field` is guided only where that has an effect."""
        combine = AdaptiveProjectedGuidance() if self.guidance == "apg" else classifier_free_guidance
        unguided, (low, high) = self.guidance == "none" or self.guidance_scale == 1.0, self.guidance_interval

        def velocity(x: Tensor, t: float) -> Tensor:
            if unguided or not low < t <= high:
                return field(x, t, False)[0]
            strength = self.guidance_scale(t) if callable(self.guidance_scale) else self.guidance_scale
            if not math.isfinite(strength):
                raise ValueError(f"guidance_scale={strength} at t={t} must be a finite number")
            # Projected guidance at a scale of 1 still adds to its average.
            conditional, unconditional = field(x, t, strength != 1 or self.guidance == "apg")
            return conditional if unconditional is None else combine(conditional, unconditional, strength)

        return velocity


USUAL = Decoding()
ONE_STEP = Decoding(num_steps=1, guidance="none", guidance_scale=1.0)
UNGUIDED = Decoding(guidance="none", guidance_scale=1.0)
_ALWAYS = ("guidance_interval", EVERYWHERE)


def chosen_decoding(own: object, usual: Decoding = USUAL, **given: Any) -> Decoding:
    """Choose each option of `Decoding`: the given one, or else the model's own, or else the usual one.

    Args:
        own: the model's configuration (`FlexTokConfig`), a published prior's `GenerationConfig`, or anything else,
            which has no options of its own. Its guidance scale is used only with its own guidance.
        usual: options that neither states.
        **given: options; None counts as not given.

    Raises:
        ValueError: an option is out of range or unknown, or a scale is given without guidance.
    """
    stated = {name: value for name in _OWN if (value := getattr(own, name, None)) is not None}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("guidance", stated.get("guidance")) != stated.get("guidance"):
        stated.pop("guidance_scale", None)
    values = {each.name: getattr(usual, each.name) for each in fields(Decoding)}
    decoding = Decoding(**{**values, **stated, **given})
    if decoding.guidance == "none" and "guidance" not in given and given.get("guidance_scale", 1.0) != 1.0:
        raise ValueError(
            f"guidance_scale={decoding.guidance_scale} has no effect with guidance='none', which is the default here; "
            "choose cfg or apg too"
        )
    return decoding


_OWN = ("num_steps", "guidance", "guidance_scale")
"""Options of a decoding that a model may set for itself."""


def integrate(
    field: VelocityField,
    x: Tensor,
    num_steps: int,
    solver: str = "euler",
    first: int | None = None,
    last: int = 0,
) -> Tensor:
    """Integrate from noise at t = 1 to data at t = 0 in equal steps at times i / num_steps.

    `first` is the i where the trajectory begins, by default at t = 1; `last` is where it ends.

    `euler` calls the field once a step. `heun` is of second order and calls it twice; its last step is an Euler step,
    because models are not trained at t = 0.
    """
    step = 1 / num_steps
    for i in range(num_steps if first is None else first, last, -1):
        slope = field(x, i / num_steps)
        if solver == "heun" and i > 1:
            slope = (slope + field(x - step * slope, (i - 1) / num_steps)) / 2
        x = x - step * slope
    return x


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """U + s * (c - u) (https://arxiv.org/abs/2207.12598, equation 6 with s = 1 + w)."""
    return unconditional + scale * (conditional - unconditional)


@dataclass
class AdaptiveProjectedGuidance:
    """Adaptive projected guidance (https://arxiv.org/abs/2410.02416, algorithm 1); one object per sampling run.

    It works on velocities instead of predictions of the clean sample, as the official FlexTok code does. The momentum
    buffer is kept without the clipping.
    """

    momentum: float = -0.5  # factor of the previous steps' difference
    eta: float = 0.0  # share that is kept of the component parallel to the conditional velocity
    norm_threshold: float = 2.5  # largest L2 norm of the difference, over a sample's (C, h, w)
    _average: Tensor | float = field(default=0.0, init=False)

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
