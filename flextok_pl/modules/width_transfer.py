"""Width transfer: use a learning rate and an initialisation at another width than they were tuned at.

This is the maximal update parametrisation for Adam (muP; Yang et al., https://arxiv.org/abs/2203.03466, table 3),
without multipliers in the forward pass: only a new model's weights and the optimizer's groups differ. As in its
authors' package, growing dimensions are found by comparing shapes with those of the same network at the base width. At
that width, initialisation and learning rates are the standard ones.

Shapes: D width, D0 base width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from flextok_pl.modules.optim import is_matrix, parameter_groups

Role = Literal["hidden", "output", "input", "vector", "fixed"]

ADAM_EPS = 1e-8  # at the base width, torch's default


class WidthPart(NamedTuple):
    """A network, and the same network at the width that was tuned.

    `initial_std` maps (fan in, fan out) to the initial standard deviation of its matrices, up to a factor that does not
    depend on the width.
    """

    network: nn.Module  # of width D
    base: nn.Module  # the same of width D0; only its shapes count, so it may lie on the meta device
    ratio: float  # D0 / D
    initial_std: Callable[[int, int], float]


class PartWeight(NamedTuple):
    """A trainable parameter of a part, its counterpart in the base network, and its role: how it grows with D.

    Both sides of a matrix grow (`hidden`), only that of its input (`output`), or only that of its output (`input`). Of
    any other parameter one dimension grows (`vector`: biases, gains, tokens, positions, embeddings). `fixed` parameters
    do not grow, or D is D0.
    """

    name: str
    parameter: nn.Parameter
    base: Tensor
    role: Role


def xavier_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of `xavier_uniform_`."""
    return math.sqrt(2.0 / (fan_in + fan_out))


def default_std(fan_in: int, fan_out: int) -> float:
    """Standard deviation of `nn.Linear`, up to a factor."""
    return 1.0 / math.sqrt(fan_in)


def check_base_width(base_width: int, multiple: int) -> None:
    """Raise ValueError for a base width that no model can have."""
    if base_width < 1 or base_width % multiple:
        raise ValueError(
            f"mup_base_width={base_width} must be a positive multiple of {multiple}: the tuned model must have the "
            "same head_dim as this one; give the width of such a model, or null for no width transfer"
        )


def part_weights(part: WidthPart) -> Iterator[PartWeight]:
    """The trainable parameters of a part with their roles."""
    for path, owner in part.network.named_modules():
        for local_name, parameter in owner.named_parameters(recurse=False):
            if not parameter.requires_grad:
                continue
            name = f"{path}.{local_name}".removeprefix(".")
            base = part.base.get_parameter(name)
            grows = [here != there for here, there in zip(parameter.shape, base.shape, strict=True)]
            role = _role(grows, is_matrix(owner, local_name, parameter))
            if role is None:
                raise ValueError(
                    f"{name} has shape {tuple(parameter.shape)}, and {tuple(base.shape)} at the base width: no rule "
                    "covers this growth; set mup_base_width to null"
                )
            yield PartWeight(name, parameter, base, role)


def _role(grows: Sequence[bool], matrix: bool) -> Role | None:
    """The role of a parameter; the dimensions of a matrix are those of output, input and kernel."""
    if not any(grows):
        return "fixed"
    if not matrix:
        return "vector" if sum(grows) == 1 else None
    if any(grows[2:]):
        return None
    return "input" if not grows[1] else "hidden" if grows[0] else "output"


@torch.no_grad()
def rescale_initial_weights(part: WidthPart) -> None:
    """Bring matrices drawn by the standard initialisation to muP's standard deviation.

    That is the standard one at D0, times (D0 / D)^(1/2) for hidden and D0 / D for output matrices. Zeros stay zeros.
    Biases, tokens, positions and embeddings stay as they are: they start alike at all widths.
    """
    powers: dict[Role, float] = {"hidden": 0.5, "output": 1.0, "input": 0.0}
    for _, parameter, base, role in part_weights(part):
        if role in powers:
            std, base_std = (part.initial_std(weight[0].numel(), weight[:, 0].numel()) for weight in (parameter, base))
            parameter.mul_(base_std / std * part.ratio ** powers[role])


def width_groups(module: nn.Module, weight_decay: float, lr: float, parts: Sequence[WidthPart]) -> list[dict[str, Any]]:
    """`parameter_groups` with learning rate, weight decay and epsilon for each role, for AdamW.

    Hidden and output matrices have lr * D0 / D. AdamW multiplies its weight decay by the learning rate. Theirs is
    divided by the same ratio, so that a step takes the same share off the weights at all widths, as in the authors'
    package (https://github.com/microsoft/mup/blob/0518b39e91caa5d81ad0529225046cbdfdef69c4/mup/optim.py).

    D0 / D multiplies the gradients of all parameters except output matrices and fixed ones. There it also multiplies
    epsilon. The first gradients of the encoder, behind gates that start at zero, are near the usual 1e-8, and that
    would slow down wide models more than narrow ones.

    `lr` and `weight_decay` are those at D0. `parts` covers everything in the module that is trained; it is empty for
    the standard parametrisation, which leaves the learning rate to the optimizer. With parts each group has a name,
    made of its role and D0 / D, for its curve.
    """
    groups = parameter_groups(module, weight_decay)
    if not parts:
        return groups
    known = {weight.parameter: (weight.role, part.ratio) for part in parts for weight in part_weights(part)}
    split: dict[str, dict[str, Any]] = {}
    for group in groups:
        for parameter in group["params"]:
            role, ratio = known[parameter]
            lr_ratio = ratio if role in ("hidden", "output") else 1.0
            eps_ratio = ratio if role in ("hidden", "input", "vector") else 1.0
            decay = group["weight_decay"] / lr_ratio
            name = (role if role == "fixed" else f"{role}_x{ratio:g}") + ("" if decay else "_no_decay")
            options = {"name": name, "lr": lr * lr_ratio, "weight_decay": decay, "eps": ADAM_EPS * eps_ratio}
            split.setdefault(name, {"params": [], **options})["params"].append(parameter)
    return list(split.values())
