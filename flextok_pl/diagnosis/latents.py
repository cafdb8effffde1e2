"""Checks of an autoencoder's latents and reconstructions."""

from __future__ import annotations

from collections.abc import Sequence

from flextok_pl.diagnosis.finding import Finding, Verdict, graded, learning

NEAR, FAR = 1.4, 2.0
"""Factors around a standard deviation of 1: latents within the first are ok, beyond the second wrong."""

DEAD = 0.05
"""Standard deviation of a channel without information, as a share of that of all."""

OFFSET = 1.0
"""Mean of a channel, in standard deviations of all, that needs a shift."""

LOST, POOR = 0.5, 0.2
"""Lost shares of the pictures' variance that make an autoencoder useless, and poor."""


def latent_scale(means: Sequence[float], stds: Sequence[float], overall: float) -> Finding:
    """Check that scaled latents have the spread of the noise that they are mixed with: by channel, and in all."""
    outside = not 1 / FAR <= overall <= FAR
    dead = [i for i, std in enumerate(stds) if std < DEAD * overall]
    moved = [i for i, mean in enumerate(means) if abs(mean) > OFFSET * overall]
    far = not 1 / NEAR <= overall <= NEAR
    verdict: Verdict = "wrong" if outside else "look" if far or dead or moved else "ok"
    says = f"scaled latents have a standard deviation of {overall:.3g}, {min(stds):.3g} to {max(stds):.3g} by channel"
    says += f", means {min(means):.2g} to {max(means):.2g}"
    remedy = []
    if outside or far:
        remedy.append(
            f"Noise of deviation 1 is too strong or too weak for them: multiply the autoencoder's scaling_factor by "
            f"{1 / max(overall, 1e-9):.3g}, write the latents again and train again"
        )
    if dead:
        says += f"; channels {dead[:8]} hardly vary"
        remedy.append("Such channels hold no information: train the autoencoder with a smaller kl_weight")
    if moved:
        says += f"; channels {moved[:8]} are off centre"
        remedy.append("A shift_factor would centre the latents")
    return graded("latent-scale", verdict, says, ". ".join(remedy), std=overall)


def reconstruction(lost: float, progress: float | None = None) -> Finding:
    """Check an autoencoder's reconstructions: the share of the pictures' variance that is lost."""
    verdict: Verdict = "wrong" if lost > LOST else "look" if lost > POOR else "ok"
    says = f"{lost:.1%} of the pictures' variance is lost"
    remedy = (
        "No tokenizer can be better than its autoencoder: train longer, with a smaller model.kl_weight or more "
        "latent_channels"
    )
    return graded("reconstruction", learning(verdict, progress), says, remedy, lost=lost)
