"""The objective that distils a decoder into one of few steps with guidance built in.

What is special about it:
- The teacher's guided flow is a deterministic map from noise to latents. The student takes N steps where the teacher
  takes M, a multiple of N. A step of the student replaces a window of M / N guided steps: its target is the mean
  velocity of the teacher over the window. So the student needs no second, unconditional pass. This is progressive
  distillation with guidance built in (https://arxiv.org/abs/2210.03142) in one stage, on straight pieces of the
  trajectory as in PeRFlow (https://arxiv.org/abs/2405.07510).
- Differs from both in where windows begin: not at noised data, but at noise, and then at the states that the student
  itself has reached, as it will in use (backward distillation, https://arxiv.org/abs/2405.05224). Training a step so
  costs what it would cost anyway, as the student's next state comes with its loss.
- It is exact: a student that has learnt its target makes the teacher's image of the same noise.
- All N windows of an image follow from one noise and one budget, so that draws are those of a tokenizer's training.

Consistency models and MeanFlow would give one network for any number of steps, but need derivatives along the flow or
targets from the student's own average; adversarial methods need a discriminator and its balance. Here the number of
steps is known, and a regression with a known target works at any scale.

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
"""Whose states windows begin at."""


class Windows(NamedTuple):
    """What a student learns of a batch; column i is the step from t = (i + 1) / N to i / N."""

    loss: Tensor  # (B, N) mean squared error of the mean velocity
    times: Tensor  # (N,) on the CPU, the middle of each window


def teacher_decoding(teacher: FlexTokConfig, options: Mapping[str, Any]) -> Decoding:
    """How a teacher decodes that is asked for these options of a `DistillationModule`."""
    names = ("guidance", "guidance_scale", "guidance_interval", "solver")
    return chosen_decoding(teacher, num_steps=options["teacher_steps"], **{name: options[name] for name in names})


def training_law(config: FlexTokConfig, nested_dropout: NestedDropoutLaw | None) -> FlexTokConfig:
    """The configuration whose budgets a student is trained on: as for its tokenizer, but none without a condition."""
    return dataclasses.replace(config, nested_dropout=nested_dropout or config.nested_dropout, null_dropout=0.0)


def check_steps(num_steps: int, teacher_steps: int) -> None:
    """Refuse steps of a student that are no windows of the teacher's."""
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

    From t = 1 on, the teacher goes from where a window begins to where it ends, without gradients. The next window
    begins where the student's step has ended, or at the teacher's end; the former is what the student will meet.

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
    tokenizer: FlexTok,  # its decoder is the student; its encoder only makes tokens
    teacher: FlowDecoder,
    latents: Tensor,  # (B, C, h, w) clean, scaled
    draws: TrainingDraws,  # noise and budgets count; no image is without its condition
    decoding: Decoding,  # the teacher's: M steps, guidance, solver
    num_steps: int,
    states: States = "student",
) -> Windows:
    """`window_losses` of a tokenizer's decoder, with gradients to it alone.

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
