"""Draw how many tokens an image keeps in training (https://arxiv.org/abs/1402.0915; FlexTok, section 3.1).

Shapes: B batch, K registers.
"""

from typing import get_args

import torch
from torch import Tensor

from flextok_pl.config import NestedDropoutLaw
from flextok_pl.contracts import default_budgets

BUDGET_LAWS = get_args(NestedDropoutLaw)


def budgets_from_uniform(law: str, num_registers: int, u: Tensor) -> Tensor:
    """Token budgets in 1..K by inverting a law's distribution function: (B,) numbers in [0, 1) -> (B,) int64.

    The laws are `uniform` over 1..K; `pow2` over 1, 2, 4, ..., K; `uniform_pow2`, uniform and then rounded up to a
    power of two (at most K); `exponential` with P(k) proportional to 2**(-8 k / K), for frequent short budgets; and
    `none`, always K.
    """
    cumulative = budget_probabilities(law, num_registers).cumsum(0)
    return torch.searchsorted(cumulative, u.to(cumulative), right=True).clamp(max=num_registers)


def budget_probabilities(law: str, num_registers: int) -> Tensor:
    """(K+1,) float64: entry k is the probability of k tokens under a law of `budgets_from_uniform`; that of 0 is 0."""
    _check_law(law)
    probabilities = torch.zeros(num_registers + 1, dtype=torch.float64)
    if law == "none":
        probabilities[-1] = 1
    elif law == "exponential":
        probabilities[1:] = _exponential_weights(num_registers)
    elif law == "uniform":
        probabilities[1:] = 1
    else:
        choices = torch.tensor(default_budgets(num_registers))
        before = torch.cat([choices.new_zeros(1), choices[:-1]])
        weights = choices - before if law == "uniform_pow2" else torch.ones_like(choices)
        probabilities[choices] = weights.to(probabilities.dtype)
    return probabilities / probabilities.sum()


def _check_law(law: str) -> None:
    if law not in BUDGET_LAWS:
        raise ValueError(f"nested_dropout={law!r} is unknown; use one of {BUDGET_LAWS}")


def _exponential_weights(num_registers: int) -> Tensor:
    return torch.exp2(-8.0 * torch.arange(1, num_registers + 1) / num_registers)
