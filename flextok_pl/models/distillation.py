"""Distil a decoder into one that needs few steps and no guidance.

- The teacher's guided flow maps noise to latents deterministically. The student takes N steps, the teacher M, a
  multiple of N. Each step of the student replaces a window of M / N guided steps. Its target is the teacher's mean
  velocity over the window, so the student needs no unconditional pass. This is progressive distillation with guidance
  built in (https://arxiv.org/abs/2210.03142) in one stage, on straight pieces of the trajectory as in PeRFlow
  (https://arxiv.org/abs/2405.07510).
- Both start windows at noised data. Here the first window starts at noise, and the next ones at the states that the
  student itself reaches, as in use (backward distillation, https://arxiv.org/abs/2405.05224). This costs nothing
  extra: the student's next state comes with its loss.
- A student that has learnt its target makes exactly the teacher's image of the same noise.
- All N windows of an image follow from one noise and one budget, drawn as in a tokenizer's training.

Consistency models and MeanFlow give one network for any number of steps, but need derivatives along the flow or
targets from the student's own average. Adversarial methods need a discriminator and its balance. Here the number of
steps is fixed, and a regression with a known target works at any scale.

Shapes: B batch, C channels, h x w latent, N steps of the student, M of the teacher.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flextok_pl.config import FlexTokConfig, NestedDropoutLaw
from flextok_pl.flow.decoding import Decoding, VelocityField, chosen_decoding, integrate
from flextok_pl.flow.rectified import velocity_loss
from flextok_pl.models.decoder import FlowDecoder, guided_field, token_layout
from flextok_pl.models.objective import TrainingDraws, kept_codes
from flextok_pl.models.tokenizer import FlexTok
from flextok_pl.precision import at_least_float32, full_precision

States = Literal["student", "teacher"]
"""Network from whose states the windows begin."""


class Windows(NamedTuple):
    """The errors of a batch. Column i is the step from t = (i + 1) / N to i / N."""

    loss: Tensor  # (B, N) mean squared error of the mean velocity
    times: Tensor  # (N,) on the CPU, the middle of each window


def teacher_decoding(teacher: FlexTokConfig, options: Mapping[str, Any]) -> Decoding:
    """How a teacher decodes under these options of a `DistillationModule`."""
    names = ("guidance", "guidance_scale", "guidance_interval", "solver")
    return chosen_decoding(teacher, num_steps=options["teacher_steps"], **{name: options[name] for name in names})


def training_law(config: FlexTokConfig, nested_dropout: NestedDropoutLaw | None) -> FlexTokConfig:
    """The configuration whose budgets a student trains on: its tokenizer's, without dropped conditions."""
    return dataclasses.replace(config, nested_dropout=nested_dropout or config.nested_dropout, null_dropout=0.0)


def check_steps(num_steps: int, teacher_steps: int) -> None:
    """Refuse a number of steps that does not divide the teacher's."""
    if num_steps < 1 or teacher_steps % num_steps:
        divisors = [n for n in range(1, teacher_steps + 1) if teacher_steps % n == 0]
        raise ValueError(
            f"num_steps={num_steps} must divide the {teacher_steps} steps of the teacher: choose from {divisors}, or "
            "set teacher_steps to a multiple"
        )


def window_losses(
    student: VelocityField,
    teacher: VelocityField,
    noise: Tensor,  # (B, C, h, w), the state at t = 1
    num_steps: int,  # N
    teacher_steps: int,  # M
    solver: str = "euler",  # the teacher's
    states: States = "student",
) -> Windows:
    """Errors of a student's Euler steps against a teacher's path over the same windows, with gradients.

    In each window the teacher goes from its beginning to its end, without gradients. The next window begins where the
    student's step has ended, as in use, or at the teacher's end.

    Raises:
        ValueError: N does not divide M, or `states` is unknown.
    """
    check_steps(num_steps, teacher_steps)
    if states not in get_args(States):
        raise ValueError(f"states={states!r} is unknown; use one of {get_args(States)}")
    losses, x, each = [], noise, teacher_steps // num_steps
    for window in range(num_steps, 0, -1):
        with torch.no_grad():
            end = integrate(teacher, x, teacher_steps, solver, window * each, (window - 1) * each)
        predicted = student(x, window / num_steps)
        losses.append(velocity_loss(predicted, (x - end) * num_steps))
        x = end if states == "teacher" else x - at_least_float32(predicted.detach()) / num_steps
    times = (torch.arange(num_steps) + 0.5) / num_steps
    return Windows(torch.stack(losses[::-1], dim=1), times)


def distillation_loss(
    tokenizer: FlexTok,  # its decoder is the student; its encoder makes the tokens
    teacher: FlowDecoder,
    latents: Tensor,  # (B, C, h, w) clean, scaled
    draws: TrainingDraws,  # noise and budgets are used; no image loses its condition
    decoding: Decoding,  # the teacher's: M steps, guidance, solver
    num_steps: int,
    states: States = "student",
) -> Windows:
    """`window_losses` of a tokenizer's decoder, with gradients to the decoder only.

    Tokens and the teacher's path are computed in float32 without autocast, whatever the precision of the training.
    """
    kept, device = draws.num_tokens, latents.device
    with torch.no_grad(), full_precision(device):
        codes = kept_codes(tokenizer, latents, kept)
        guided = decoding.guided(guided_field(teacher, codes, kept, latents))
    layout = token_layout(tokenizer.config, latents, kept)

    def path(x: Tensor, t: float) -> Tensor:
        with full_precision(device):
            return guided(x, t)

    def student(x: Tensor, t: float) -> Tensor:
        return tokenizer.decoder(x, x.new_full((1,), t), codes, layout).velocity  # type: ignore[no-any-return]

    return window_losses(student, path, draws.noise, num_steps, decoding.num_steps, decoding.solver, states)
