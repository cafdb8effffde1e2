"""Checks of tokens: whether the decoder uses them, which positions and budgets add something, which codes occur.

Losses are the decoder's mean squared velocity errors, of an image at the same noise and time. `Paired` is the mean of
a difference over images with its standard error.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from flextok_pl.diagnosis.finding import Finding, Verdict, graded, learning

ERRORS = 2.0
"""Standard errors by which a mean difference must exceed zero to count."""

USED, WEAK = 0.01, 0.05
"""Shares by which another image's tokens raise the loss: below the first they are unused, below the second weak."""

ADDED = 0.01
"""Share of the gain of all tokens over one token that a further budget must add."""

MATTERS = 0.01
"""Share of an error by which another one must be larger to count as worse."""

COLLAPSED, CONSTANT = 0.1, 0.05
"""Shares of the largest possible entropy: for the mean over positions, and for a position with nearly one token."""

FEW_NULL, MANY_NULL = 0.02, 0.5
"""Rates of dropped conditions below and above which a training is unusual; published models use 0.1 to 0.2."""

LISTENS = 0.002
"""Share by which a prior's loss must rise without its condition."""


class Paired(NamedTuple):
    """A mean difference over images."""

    mean: float
    error: float = 0.0  # its standard error; 0 if unknown

    @property
    def clear(self) -> bool:
        """Whether it exceeds zero by more than its noise."""
        return self.mean > ERRORS * self.error

    def __str__(self) -> str:
        return f"{self.mean:.4g}" + (f" ± {self.error:.1g}" if self.error else "")


def token_use(own: float, gap: Paired, progress: float | None = None, others: str = "another image's") -> Finding:
    """Check that the decoder uses the tokens: `gap` is how much `others` tokens raise the loss `own`."""
    share = gap.mean / own if own > 0 else 0.0
    unused = share < USED or not gap.clear
    verdict: Verdict = "wrong" if unused else "look" if share < WEAK else "ok"
    says = f"{others} tokens change the loss {own:.4g} by {gap} ({share:+.1%})"
    remedy = (
        "The decoder does not use its tokens: train longer, with model.pure_noise 0.5 to 0.7 or a larger "
        "model.timestep_shift, and look at latent-scale, loss-falls and codebook-use"
    )
    return graded("token-use", learning(verdict, progress), says, remedy, own=own, gap=gap.mean, error=gap.error)


def token_positions(gaps: Mapping[tuple[int, int], Paired], progress: float | None = None) -> Finding:
    """Check which positions matter: ranges of positions, from 1 -> the cost of another image's tokens there.

    All other positions keep the image's own tokens.
    """
    idle = [_range(each) for each, gap in gaps.items() if not gap.clear]
    verdict: Verdict = "wrong" if len(idle) == len(gaps) else "look" if idle else "ok"
    costs = ", ".join(f"{_range(each)}: {gap}" for each, gap in gaps.items())
    says = f"another image's tokens at positions cost {costs}" + (f"; nothing at {', '.join(idle)}" if idle else "")
    remedy = (
        "These positions add nothing to the others: train longer, draw long budgets more often "
        "(model.net.nested_dropout uniform), or take fewer model.net.num_registers"
    )
    values = {f"positions {_range(each)}": gap.mean for each, gap in gaps.items()}
    return graded("token-positions", learning(verdict, progress), says, remedy, **values)


def budgets(errors: Mapping[int, float], gains: Mapping[int, Paired], progress: float | None, of: str) -> Finding:
    """Check that more tokens help: budget -> error, and budget -> gain over the one before, except the smallest.

    `of` names the errors.
    """
    kept = sorted(errors)
    total = errors[kept[0]] - errors[kept[-1]]
    idle = [k for k, gain in gains.items() if not gain.clear or gain.mean < ADDED * total]
    least = max(ADDED * abs(total), MATTERS * errors[kept[-1]])
    harmful = [k for k, gain in gains.items() if gain.mean < -max(ERRORS * gain.error, least)]
    last = next((k for k in reversed(kept) if k in gains and k not in idle), kept[0])
    verdict: Verdict = "wrong" if last == kept[0] else "look" if harmful or last != kept[-1] else "ok"
    says = f"{of} by budget: " + ", ".join(f"{k}: {errors[k]:.4g}" for k in kept)
    if last != kept[-1]:
        says += f"; no gain beyond {last}"
    if harmful:
        says += f"; worse at {', '.join(map(str, harmful))} than with fewer"
    remedy = (
        "Budgets without gain cost a prior time: train longer, draw them more often (model.net.nested_dropout "
        "uniform), or take fewer model.net.num_registers; see token-positions"
    )
    return graded("budgets", learning(verdict, progress), says, remedy, **{f"k={k}": errors[k] for k in kept})


def budgets_of_means(errors: Mapping[int, float], progress: float | None, of: str) -> Finding:
    """`budgets`, if only the means over images are known."""
    kept = sorted(errors)
    gains = {k: Paired(errors[before] - errors[k]) for before, k in pairwise(kept)}
    return budgets(errors, gains, progress, of)


def codebook_use(entropies: Sequence[float], samples: int, vocab_size: int, progress: float | None = None) -> Finding:
    """Check that the ids at each position differ between images: bits of entropy by position, over `samples` images."""
    most = math.log2(max(2, min(samples, vocab_size)))
    mean = sum(entropies) / len(entropies)
    constant = [i for i, bits in enumerate(entropies, 1) if bits < CONSTANT * most]
    verdict: Verdict = "wrong" if mean < COLLAPSED * most else "look" if constant else "ok"
    says = f"{mean:.2f} bits a token, of {most:.2f} that {samples} images can show of {vocab_size} ids"
    if constant:
        says += f"; nearly one id at position {_some(constant)}"
    remedy = (
        "Images share their tokens: the encoder has collapsed or has not begun to learn. See token-use; lower "
        "model.lr, and check that the encoder trains"
    )
    return graded("codebook-use", learning(verdict, progress), says, remedy, entropy=mean, most=most)


def fsq_levels(shares: Sequence[Sequence[float]], codes: int) -> Finding:
    """Check that all levels of all code dimensions occur: shares of the levels by dimension, in `codes` codes."""
    single = [d for d, levels in enumerate(shares, 1) if max(levels) > 0.999]
    unused = {d: levels.count(0.0) for d, levels in enumerate(shares, 1) if 0.0 in levels}
    verdict: Verdict = "wrong" if single else "look" if unused else "ok"
    seen = sum(len(each) - each.count(0.0) for each in shares)
    says = f"{seen} of {sum(map(len, shares))} levels occur in {codes:,} codes"
    if single:
        says += f"; one level only in dimension {_some(single)}"
    elif unused:
        says += "; unused: " + ", ".join(f"{count} in dimension {d}" for d, count in unused.items())
    remedy = (
        "A dimension with one level wastes its share of the vocabulary: lower model.lr, or take fewer "
        "model.net.fsq_levels"
    )
    return graded("fsq-levels", verdict, says, remedy)


def null_condition(own: float, null: float, other: Paired) -> Finding:
    """Check that the decoder has learned the null condition.

    `own` and `null` are its losses with an image's tokens and with none; `other` compares another image's with none.
    """
    verdict: Verdict = "look" if other.mean < -max(ERRORS * other.error, MATTERS * null) else "ok"
    says = f"loss {own:.4g} with tokens, {null:.4g} without; another image's tokens cost {other} more than none"
    remedy = (
        "The decoder does worse without tokens than with wrong ones, so guidance has no sound baseline: "
        "train with a larger model.net.null_dropout"
    )
    return graded("null-condition", verdict, says, remedy, own=own, null=null)


def null_rate(rate: float, option: str) -> Finding:
    """Check that training drops conditions at a usual rate, which `option` sets."""
    verdict: Verdict = "ok" if FEW_NULL <= rate <= MANY_NULL else "look"
    says = f"{option}={rate:g} of the training samples have no condition"
    remedy = (
        f"Guidance needs training samples without condition: {option} 0.1 to 0.2"
        if rate < FEW_NULL
        else f"Most training samples lack the condition that the model should learn to use: {option} 0.1 to 0.2"
    )
    return graded("null-rate", verdict, says, remedy, rate=rate)


def condition_use(gap: float, loss: float, progress: float | None = None) -> Finding:
    """Check that a prior uses its condition: `gap` is how much its loss, in nats, rises without it."""
    share = gap / loss if loss > 0 else 0.0
    verdict: Verdict = "ok" if share >= LISTENS else "look" if gap > 0 else "wrong"
    says = f"without its condition the prior's loss {loss:.4g} rises by {gap:.4g} ({share:+.2%})"
    remedy = (
        "It does not use its condition: check that labels or captions belong to the pictures (flextok data stats), "
        "and lower model.condition_dropout"
    )
    return graded("condition-use", learning(verdict, progress), says, remedy, gap=gap, loss=loss)


def prior_bits(bits: float, vocab_size: int, progress: float | None = None) -> Finding:
    """Check that a prior does better than guessing among all ids: bits per token in validation."""
    most = math.log2(vocab_size)
    verdict: Verdict = "wrong" if bits > 1.05 * most else "look" if bits > 0.98 * most else "ok"
    says = f"{bits:.2f} bits per token; guessing among {vocab_size:,} ids is {most:.2f}"
    remedy = (
        "No better than guessing: train longer; check that training and validation have tokens of one tokenizer, and "
        "look at overfitting"
    )
    return graded("prior-bits", learning(verdict, progress), says, remedy, bits=bits, most=most)


def _range(positions: tuple[int, int]) -> str:
    first, last = positions
    return str(first) if first == last else f"{first}-{last}"


def _some(numbers: Sequence[int]) -> str:
    more = f" and {len(numbers) - 6} more" if len(numbers) > 6 else ""
    return ", ".join(map(str, numbers[:6])) + more
