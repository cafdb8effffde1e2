"""How tokens are decoded: the solver with its steps, and the guidance."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor

from flextok_pl.contracts import GuidanceScale, is_whole
from flextok_pl.flow.guidance import GUIDANCE_KINDS, guided_field
from flextok_pl.flow.integrate import SOLVERS, VelocityField, integrate


@dataclass(frozen=True)
class Decoding:
    """The options of one decoding; the defaults are those of the published models.

    Args:
        num_steps: of the solver.
        guidance: one of `GUIDANCE_KINDS`.
        guidance_scale: its strength, a number or a function of t; 1 is no guidance.
        solver: one of `SOLVERS`.

    Raises:
        ValueError: an option is unknown or out of range.
    """

    num_steps: int = 25
    guidance: str = "apg"
    guidance_scale: GuidanceScale = 7.5
    solver: str = "euler"

    def __post_init__(self) -> None:
        if not is_whole(self.num_steps) or self.num_steps < 1:
            raise ValueError(f"num_steps={self.num_steps} must be at least 1, and a whole number")
        for name, known in (("guidance", GUIDANCE_KINDS), ("solver", SOLVERS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown; use one of {known}")

    @property
    def facts(self) -> dict[str, Any]:
        """What a record states of it."""
        return asdict(self)

    @property
    def arguments(self) -> dict[str, Any]:
        """Arguments for `Reconstructor.detokenize`, which need not know other solvers than Euler's."""
        return {name: value for name, value in asdict(self).items() if (name, value) != ("solver", "euler")}

    def under(self, objective: str) -> Decoding:
        """What a tokenizer of this objective does when asked for it: one that regresses takes one step, unguided."""
        return ONE_STEP if objective == "mse" else self

    def sample(self, conditional: VelocityField, unconditional: VelocityField, noise: Tensor) -> Tensor:
        """Follow the guided velocity from noise (B, C, h, w) to latents of the same shape."""
        field = guided_field(conditional, unconditional, self.guidance, self.guidance_scale)
        return integrate(field, noise, self.num_steps, self.solver)


ONE_STEP = Decoding(num_steps=1, guidance="none", guidance_scale=1.0)
