"""Checks of logged values, during a training and after it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import isfinite

from flextok_pl.diagnosis.finding import Finding
from flextok_pl.diagnosis.latents import reconstruction
from flextok_pl.diagnosis.tokens import (
    Paired,
    budgets_of_means,
    codebook_use,
    condition_use,
    null_rate,
    prior_bits,
    token_use,
)
from flextok_pl.diagnosis.training import data_share, ema_lag


@dataclass(frozen=True)
class Facts:
    """Facts of a training that the checks need beside its logs."""

    steps: int = 0  # so far
    total: int | None = None  # of the whole training; None for one without end
    vocab_size: int | None = None
    val_samples: int | None = None
    null_rates: tuple[tuple[str, float], ...] = ()  # option -> share of the samples without condition
    ema: tuple[float, int] | None = None  # decay, and steps between updates

    @property
    def progress(self) -> float | None:
        """Finished share of the training."""
        return None if self.total is None else min(1.0, self.steps / self.total)


def of_logged(values: Mapping[str, float], facts: Facts) -> Iterator[Finding]:
    """Yield findings about the latest logged values, except missing ones and those that are not finite."""
    values, progress = {name: value for name, value in values.items() if isfinite(value)}, facts.progress
    if {"val/loss", "val/loss_other_tokens"} <= values.keys():
        own = values["val/loss"]
        yield token_use(own, Paired(values["val/loss_other_tokens"] - own), progress, "random")
    if "val/codes/entropy" in values and facts.vocab_size is not None and facts.val_samples is not None:
        yield codebook_use([values["val/codes/entropy"]], facts.val_samples, facts.vocab_size, progress)
    errors = {int(found[1]): values[name] for name in values if (found := re.fullmatch(r"val/mse/k=(\d+)", name))}
    if len(errors) > 1:
        yield budgets_of_means(errors, progress, "squared error")
    if {"val/condition_gap", "val/loss"} <= values.keys():
        yield condition_use(values["val/condition_gap"], values["val/loss"], progress)
    if "val/bits_per_token" in values and facts.vocab_size is not None:
        yield prior_bits(values["val/bits_per_token"], facts.vocab_size, progress)
    if "val/mse_over_variance" in values:
        yield reconstruction(values["val/mse_over_variance"], progress)
    if "train/data_share" in values:
        yield data_share(values["train/data_share"])
    for option, rate in facts.null_rates:
        yield null_rate(rate, option)
    if facts.ema is not None:
        yield ema_lag(*facts.ema, facts.total or facts.steps)
