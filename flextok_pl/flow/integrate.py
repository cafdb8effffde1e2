"""Solvers that follow a velocity field from noise (t = 1) to data (t = 0).

Shapes: x is (B, C, h, w).
"""

from collections.abc import Callable

from torch import Tensor

VelocityField = Callable[[Tensor, float], Tensor]
"""(x, t) -> dx/dt at time t, of x's shape."""

SOLVERS = ("euler", "heun")


def integrate(field: VelocityField, x: Tensor, num_steps: int, solver: str = "euler") -> Tensor:
    """Integrate from t = 1 to t = 0 in equal steps.

    Args:
        field: the velocity field.
        x: noise, the state at t = 1.
        num_steps: number of steps; the times are i / num_steps.
        solver: `euler` (one evaluation a step) or `heun` (two, second order; the last step is an Euler step,
            as t = 0 is outside what models are trained on).
    """
    step = 1 / num_steps
    for i in range(num_steps, 0, -1):
        slope = field(x, i / num_steps)
        if solver == "heun" and i > 1:
            slope = (slope + field(x - step * slope, (i - 1) / num_steps)) / 2
        x = x - step * slope
    return x
