"""Rectified flow (https://arxiv.org/abs/2209.03003): the straight path between data and noise.

t = 0 is data and t = 1 is noise: x_t = t * noise + (1 - t) * clean, and the velocity is noise - clean.

Shapes: B batch; tensors of latents are (B, ...).
"""

import math
from typing import get_args

import torch
from torch import Tensor

from flextok_pl.config import TimestepLaw
from flextok_pl.precision import at_least_float32

TIMESTEP_LAWS = get_args(TimestepLaw)


def interpolate(clean: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """x_t on the straight path; `t` is (B,)."""
    t = t.view(-1, *[1] * (clean.ndim - 1))
    return t * noise + (1 - t) * clean


def velocity_target(clean: Tensor, noise: Tensor) -> Tensor:
    """The velocity that the model learns to predict: noise - clean."""
    return noise - clean


def velocity_loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Mean squared error per sample, (B,)."""
    return (at_least_float32(predicted) - at_least_float32(target)).square().flatten(1).mean(1)


def sample_timesteps(
    law: str,
    batch_size: int,
    generator: torch.Generator,
    *,
    mode_scale: float = 0.25,
    shift: float = 1.0,
    stratified: bool = False,
) -> Tensor:
    """Draw training timesteps: (B,) float32 in (0, 1), on the generator's device.

    The laws are `logit_normal`, sigmoid(N(0, 1)); `uniform`, U(0, 1); and `mode`, the Stable Diffusion 3 law
    (https://arxiv.org/abs/2403.03206, equation 20) with s = `mode_scale`, as `mode_from_uniform`. A `shift` above 1
    trains more on noisy inputs (equation 23 there). `stratified` takes one draw in each of B equal quantiles instead of
    B independent draws.
    """
    if law not in TIMESTEP_LAWS:
        raise ValueError(f"timestep_law={law!r} is unknown; use one of {TIMESTEP_LAWS}")
    device = generator.device
    if law == "logit_normal" and not stratified:
        t = torch.randn(batch_size, generator=generator, device=device).sigmoid()
    else:
        u = torch.rand(batch_size, generator=generator, device=device)
        if stratified:
            u = stratify(u)
        if law == "logit_normal":
            t = logit_normal_from_uniform(u)
        else:
            t = mode_from_uniform(u, mode_scale if law == "mode" else 0.0)
    return shift * t / (1 + (shift - 1) * t)


def stratify(u: Tensor) -> Tensor:
    """Move B draws of U(0, 1) into the B equal parts of (0, 1), in order."""
    return torch.arange(len(u), device=u.device) / len(u) + u / len(u)


def lattice(batch_size: int, generator: torch.Generator) -> Tensor:
    """A permutation (B,) int64 that pairs B strata of one number with those of another: i -> (a i + shift) mod B.

    With a near the golden section of B, pairs cover the plane evenly (a rank-1 lattice). If n divides B, every n-th
    image has every n-th stratum of both numbers, so the images of each process are stratified too.
    """
    step = round(0.618 * batch_size)
    while math.gcd(step, batch_size) != 1:
        step += 1
    shift = torch.randint(batch_size, (1,), generator=generator)
    return (torch.arange(batch_size) * step + shift) % batch_size


def logit_normal_from_uniform(u: Tensor) -> Tensor:
    """Sigmoid of the normal quantile of u."""
    return (math.sqrt(2) * torch.erfinv(2 * u - 1)).sigmoid()


def mode_from_uniform(u: Tensor, scale: float) -> Tensor:
    """1 - u - s * (cos(pi u / 2)**2 - 1 + u), Stable Diffusion 3's law with a heavy middle; s = 0 gives U(0, 1).

    At s = 0 it returns u itself, as the official FlexTok code does, unlike the paper.
    """
    if scale == 0:
        return u
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)
