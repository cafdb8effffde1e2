"""How many tokens an image keeps in training (https://arxiv.org/abs/1402.0915; FlexTok, section 3.1).

Shapes: B batch, K registers.
"""

from typing import get_args

import torch
from torch import Tensor

from flextok_pl.config import NestedDropoutLaw
from flextok_pl.contracts import default_budgets

BUDGET_LAWS = get_args(NestedDropoutLaw)


def sample_num_tokens(law: str, batch_size: int, num_registers: int, generator: torch.Generator) -> Tensor:
    """Draw a token budget for every image: (B,) int64 in 1..K, on the generator's device.

    The laws are `uniform` over 1..K; `pow2` over 1, 2, 4, ..., K; `uniform_pow2` uniform and then rounded up to a power
    of two (at most K); `exponential` with P(k) proportional to 2**(-8 k / K), so that short budgets are frequent; and
    `none`, always K.
    """
    _check_law(law)
    device = generator.device
    if law == "none":
        return torch.full((batch_size,), num_registers, device=device)
    if law == "exponential":
        weights = _exponential_weights(num_registers).to(device)
        return 1 + torch.multinomial(weights, batch_size, replacement=True, generator=generator)
    choices = torch.tensor(default_budgets(num_registers), device=device)
    if law == "pow2":
        return choices[torch.randint(len(choices), (batch_size,), generator=generator, device=device)]
    k = torch.randint(1, num_registers + 1, (batch_size,), generator=generator, device=device)
    if law == "uniform_pow2":
        return choices[torch.searchsorted(choices, k)]
    return k


def budget_probabilities(law: str, num_registers: int) -> Tensor:
    """(K+1,) float64: entry k is the probability of k tokens under a law of `sample_num_tokens`, that of 0 being 0."""
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
