"""Parameter groups and the learning-rate schedule."""

import copy
import math

import pytest
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from torch import nn

from flextok_pl.modules.optim import adamw, clip_gradients, parameter_groups, warmup_cosine


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.conv = nn.Conv2d(4, 4, 3)
        self.norm = nn.LayerNorm(4)
        self.embedding = nn.Embedding(5, 4)
        self.registers = nn.Parameter(torch.zeros(3, 4))
        self.frozen = nn.Parameter(torch.zeros(3, 4), requires_grad=False)
        self.tied = self.linear


def test_only_matrices_and_kernels_decay() -> None:
    network = Network()
    decay, rest = parameter_groups(network, 0.1)
    assert decay["weight_decay"] == 0.1 and rest["weight_decay"] == 0.0
    assert {id(p) for p in decay["params"]} == {id(network.linear.weight), id(network.conv.weight)}
    assert len(decay["params"]) == 2  # a tied layer once
    others = (network.linear.bias, network.conv.bias, network.norm.weight, network.norm.bias)
    assert {id(p) for p in rest["params"]} == {id(p) for p in (*others, network.embedding.weight, network.registers)}


def test_empty_groups_are_left_out() -> None:
    assert len(parameter_groups(nn.Linear(2, 2, bias=False), 0.1)) == 1


def ratios(steps: int, **options: float) -> list[float]:
    parameter = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    schedule = warmup_cosine(optimizer, **options)  # type: ignore[arg-type]
    values = []
    for _ in range(steps):
        values.append(optimizer.param_groups[0]["lr"] / 2.0)
        optimizer.step()
        schedule.step()
    return values


def test_schedule_values() -> None:
    values = ratios(13, warmup_steps=3, total_steps=11, min_ratio=0.2)
    assert values[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert values[5] == pytest.approx(0.2 + 0.8 * 0.5 * (1 + math.cos(math.pi / 4)))
    assert values[7] == pytest.approx(0.6)  # half way
    assert values[11:] == pytest.approx([0.2, 0.2])


def test_schedule_without_warmup_or_end() -> None:
    assert ratios(1, warmup_steps=0, total_steps=10)[0] == 1.0
    assert ratios(5, warmup_steps=1, total_steps=float("inf")) == [0.5, 1.0, 1.0, 1.0, 1.0]
    assert ratios(3, warmup_steps=0, total_steps=-1) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize(
    "options",
    [
        {"warmup_steps": -1, "total_steps": 10},
        {"warmup_steps": 10, "total_steps": 10},
        {"warmup_steps": 0, "total_steps": 10, "min_ratio": 1.5},
    ],
)
def test_schedule_options_are_checked(options: dict[str, float]) -> None:
    with pytest.raises((ValueError, MisconfigurationException), match="warmup_steps=|min_lr_ratio="):
        ratios(1, **options)


def steps(network: nn.Module, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        for number, parameter in enumerate(network.parameters()):
            noise = torch.Generator().manual_seed(100 * step + number)
            parameter.grad = torch.randn(parameter.shape, generator=noise) * 1e-3
        optimizer.step()


def test_one_kernel_updates_as_many_do_and_goes_on_with_their_checkpoint() -> None:
    """Such as one of a version that had no such kernel, or of a device that has none."""
    torch.manual_seed(0)
    plain = nn.Sequential(nn.Linear(7, 5), nn.Linear(5, 3))
    usual = torch.optim.AdamW(parameter_groups(plain, 0.1), lr=1e-2, betas=(0.9, 0.95))
    steps(plain, usual, 0, 3)
    fused = copy.deepcopy(plain)
    optimizer = adamw(parameter_groups(fused, 0.1), 1e-2, (0.9, 0.95))
    optimizer.load_state_dict(copy.deepcopy(usual.state_dict()))
    assert [group["fused"] for group in optimizer.param_groups] == [True, True]
    assert all(state["step"].dtype == torch.float32 and state["step"] == 3 for state in optimizer.state.values())
    for network, each in ((plain, usual), (fused, optimizer)):
        steps(network, each, 3, 6)
    for own, expected in zip(fused.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(own, expected, rtol=1e-6, atol=1e-8)
    with torch.device("meta"):
        assert adamw(parameter_groups(nn.Linear(2, 2), 0.1), 1e-2, (0.9, 0.95)).defaults["fused"] is None


@pytest.mark.parametrize(
    ("limit", "algorithm", "left"),
    [
        (None, None, [3.0, 4.0]),
        (0, "norm", [3.0, 4.0]),
        (1.0, "norm", [0.6, 0.8]),
        (10.0, "norm", [3.0, 4.0]),
        (3.5, "value", [3.0, 3.5]),
    ],
)
def test_the_norm_is_that_before_clipping(limit: float | None, algorithm: str | None, left: list[float]) -> None:
    network = nn.Linear(2, 2)
    assert clip_gradients(network, limit, algorithm) == 0
    assert clip_gradients(nn.Linear(2, 2, device="meta"), limit, algorithm).is_meta, "joins the norms of others there"
    network.bias.grad = torch.tensor([3.0, 4.0])
    assert clip_gradients(network, limit, algorithm).item() == 5.0
    assert network.bias.grad.tolist() == pytest.approx(left, rel=1e-5) and network.weight.grad is None
