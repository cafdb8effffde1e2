"""Checks of a training: loss, gradients, learning rate, averaged weights and speed.

A curve is a list of (step, value).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, median, stdev

from flextok_pl.diagnosis.finding import Finding, Verdict, graded, learning

Curve = Sequence[tuple[int, float]]

LEAST = 8
"""Least number of values for a statement about a curve."""

ROSE = 1.05
"""Factor over its minimum at which a validation loss counts as risen."""

SPIKE, SPIKES, STEEP = 10.0, 0.01, 5.0
"""Height of a spike in medians, and the share of spikes and the rise of the median above which they are unusual."""

LAG, LONG_LAG = 0.25, 1.0
"""Half-lives of the averaged weights, as shares of the training, that make them lag, and that make them old."""

BEHIND = 1.02
"""Factor over the raw weights' loss above which the averaged ones count as worse."""

WAITS, STARVES = 0.15, 0.4
"""Shares of the time spent waiting for data: above the first `look`, above the second `wrong`."""

SLOW, CRAWLS = 0.7, 0.35
"""Shares of the planned speed: below the first `look`, below the second `wrong`."""


def loss_falls(loss: Curve, warmup_steps: int, progress: float | None, started: bool = False) -> Finding | None:
    """Check that the training loss falls from the first quarter after the warm-up to the last; None for too few values.

    `started`: the training began with trained weights, whose loss need not fall.
    """
    values = [value for step, value in loss if step > warmup_steps and math.isfinite(value)]
    quarter = len(values) // 4
    if quarter < LEAST // 4:
        return None
    first, last = values[:quarter], values[-quarter:]
    fall = fmean(first) - fmean(last)
    error = math.sqrt(sum(stdev(part) ** 2 / len(part) for part in (first, last))) if quarter > 1 else 0.0
    flat = fall < 2 * error
    verdict: Verdict = "ok" if not flat else "look" if started and fall > -2 * error else "wrong"
    says = f"train/loss went from {fmean(first):.4g} to {fmean(last):.4g} (± {error:.1g})"
    remedy = (
        "It does not fall by more than its noise: lower model.lr by 3 to 10 times, look at gradient-norm and "
        "latent-scale, and check that the parts to train are not frozen"
    )
    return graded("loss-falls", learning(verdict, progress), says, remedy, first=fmean(first), last=fmean(last))


def overfitting(losses: Curve) -> Finding | None:
    """Check that the validation loss has not risen from its minimum; None for too few validations."""
    values = [(step, value) for step, value in losses if math.isfinite(value)]
    if len(values) < 4:
        return None
    (at, lowest), (_, last) = min(values, key=lambda each: each[1]), values[-1]
    verdict: Verdict = "look" if last > ROSE * lowest else "ok"
    says = f"val/loss is {last:.4g}; its lowest was {lowest:.4g} at step {at:,}"
    remedy = (
        "It memorises its training samples: take the checkpoint of that step (best: {monitor: val/loss, "
        "filename: best}), train shorter, on more data or more augmentation, or with more weight decay"
    )
    return graded("overfitting", verdict, says, remedy, last=last, lowest=lowest)


def finite(values: Mapping[str, float]) -> Finding:
    """Check that all measurements are finite: names and values, such as the number of weights that are not."""
    bad = [name for name, value in values.items() if not math.isfinite(value)]
    says = f"{len(values) - len(bad)} of {len(values)} values are finite"
    if bad:
        more = f" and {len(bad) - 5} more" if len(bad) > 5 else ""
        says += f"; not finite: {', '.join(bad[:5])}{more}"
    remedy = (
        "The training has diverged: resume from the last good checkpoint with a lower model.lr or "
        "trainer.gradient_clip_val; with 16-mixed try bf16-mixed"
    )
    return graded("finite", "wrong" if bad else "ok", says, remedy)


def gradient_norm(norms: Curve, clip: float | None) -> Finding | None:
    """Check that the gradient's norm, before clipping, is steady; None for too few values."""
    values = [value for _, value in norms if math.isfinite(value)][len(norms) // 10 :]  # without the first steps
    if len(values) < LEAST:
        return None
    middle = median(values)
    spikes = sum(value > SPIKE * middle for value in values) / len(values)
    quarter = len(values) // 4
    rise = median(values[-quarter:]) / max(median(values[:quarter]), 1e-30)
    clipped = sum(value > clip for value in values) / len(values) if clip else 0.0
    vanished = middle < 1e-8
    verdict: Verdict = "wrong" if vanished else "look" if spikes > SPIKES or rise > STEEP else "ok"
    says = f"median {middle:.3g}, largest {max(values):.3g}, {spikes:.1%} above {SPIKE:.0f} medians"
    says += f", last quarter over first {rise:.2g}" + (f", {clipped:.0%} clipped at {clip:g}" if clip else "")
    remedy = (
        "No gradient reaches the weights: check what is frozen"
        if vanished
        else "Spikes disturb a training: lower model.lr, warm up longer (model.warmup_steps), or clip "
        "(trainer.gradient_clip_val 1.0); look at the samples of such steps"
    )
    return graded("gradient-norm", verdict, says, remedy, median=middle, spikes=spikes, rise=rise)


def learning_rate(rates: Curve, lr: float, warmup_steps: int, max_steps: int | None) -> Finding | None:
    """Check that the learning rate went as configured: a warm-up to `lr`, and less after it; None without values."""
    values = [(step, value) for step, value in rates if math.isfinite(value)]
    if not values:
        return None
    (last_step, last), (peak_step, peak) = values[-1], max(values, key=lambda each: each[1])
    says = f"largest {peak:.3g} at step {peak_step:,}, now {last:.3g} at step {last_step:,}; configured {lr:.3g}"
    remedy = ""
    verdict: Verdict = "ok"
    if peak > 1.01 * lr:
        verdict, remedy = "look", "It was higher than configured: part of the run used another (changes.jsonl)"
    elif last_step <= warmup_steps:
        verdict, remedy = "look", f"The warm-up of {warmup_steps:,} steps is not over yet"
    elif peak < 0.9 * lr:
        verdict, remedy = "look", "It never reached the configured one: see model.warmup_steps and model.mup_base_width"
    elif max_steps and warmup_steps > 0.2 * max_steps:
        verdict = "look"
        remedy = f"The warm-up takes {warmup_steps / max_steps:.0%} of the training: lower model.warmup_steps"
    return graded("learning-rate", verdict, says, remedy, peak=peak, last=last)


def ema_lag(decay: float, update_every: int, steps: int) -> Finding:
    """Check that averaged weights are recent: their decay, steps between updates, steps of the training."""
    half_life = update_every * math.log(0.5) / math.log(decay) if decay > 0 else 0.0
    share = half_life / max(steps, 1)
    verdict: Verdict = "wrong" if share > LONG_LAG else "look" if share > LAG else "ok"
    says = f"half of the averaged weights' mass is from the last {half_life:,.0f} of {steps:,} steps"
    best = 0.5 ** (update_every / max(0.1 * steps, 1))
    remedy = f"The average covers worse, older weights: with ema.decay {best:.4g} it covers the last tenth"
    return graded("ema-lag", verdict, says, remedy, half_life=half_life, share=share)


def ema_distance(distance: float, losses: tuple[float, float] | None) -> Finding:
    """Check that averaged weights do as well as raw ones.

    Args:
        distance: norm of their difference over that of the raw ones.
        losses: losses of the averaged and the raw weights on the same samples, if measured.
    """
    behind = losses is not None and losses[0] > BEHIND * losses[1]
    says = f"averaged and raw weights differ by {distance:.2%}"
    if losses is not None:
        says += f"; loss {losses[0]:.4g} averaged, {losses[1]:.4g} raw"
    remedy = "The averaged weights, which are evaluated and exported, are worse: lower ema.decay, or train longer"
    return graded("ema-distance", "look" if behind else "ok", says, remedy, distance=distance)


def data_share(share: float) -> Finding:
    """Check that training does not wait for data: the median share of its time."""
    verdict: Verdict = "wrong" if share > STARVES else "look" if share > WAITS else "ok"
    remedy = (
        "Raise data.num_workers, store latents or tokens once (flextok data latents), set data.cache_in_memory for a "
        "small set, or data.fast_decode for large JPEG pictures"
    )
    return graded("data-share", verdict, f"{share:.1%} of the time is spent waiting for data", remedy, share=share)


def throughput(images_per_s: float, planned: float) -> Finding:
    """Check that a training is as fast as planned: medians of images per second over all devices."""
    share = images_per_s / planned
    verdict: Verdict = "wrong" if share < CRAWLS else "look" if share < SLOW else "ok"
    says = f"{images_per_s:,.1f} images/s, {share:.0%} of the planned {planned:,.1f}"
    remedy = (
        "See data-share first; then trainer.precision bf16-mixed, model.compile_blocks, a larger data.batch_size "
        "(flextok plan), and docs/speed.md"
    )
    return graded("throughput", verdict, says, remedy, images_per_s=images_per_s, planned=planned)
