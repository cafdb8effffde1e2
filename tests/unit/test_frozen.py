"""`Frozen` hides a network from its owner, except for devices, dtypes, calls and attributes."""

import copy
import pickle

import torch
from torch import nn

from flextok_pl.layers.frozen import Frozen


class Owner(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Linear(2, 2)
        self.helper = Frozen(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)))


def test_hidden_from_parameters_state_and_copies() -> None:
    owner = Owner()
    assert {name for name, _ in owner.named_parameters()} == {"own.weight", "own.bias"}
    assert set(owner.state_dict()) == {"own.weight", "own.bias"}
    assert not list(owner.helper.buffers())
    owner.load_state_dict(owner.state_dict())
    twin = copy.deepcopy(owner)
    assert twin.own is not owner.own
    assert twin.helper.module is owner.helper.module


def test_stays_frozen_and_in_eval_mode() -> None:
    owner = Owner().train().requires_grad_(True)
    assert not any(p.requires_grad for p in owner.helper.module.parameters())
    assert not owner.helper.module.training and not owner.helper.module[1].training
    before = owner.helper.module[1].running_mean.clone()
    x = torch.randn(4, 2, requires_grad=True)
    owner.helper(x).sum().backward()
    assert torch.equal(owner.helper.module[1].running_mean, before)
    assert x.grad is not None


def test_follows_moves_and_delegates() -> None:
    owner = Owner().to(torch.float64)
    assert owner.helper.module[0].weight.dtype == torch.float64
    assert owner.helper.module[1].running_mean.dtype == torch.float64
    assert owner.to("meta").helper.module[0].weight.is_meta
    assert Frozen(nn.Linear(3, 2)).in_features == 3


def test_stays_where_it_is_put() -> None:
    owner = Owner()
    owner.helper = Frozen(nn.Linear(2, 2), follows=False)
    owner.to("meta")
    assert owner.own.weight.is_meta and owner.helper.module.weight.device.type == "cpu"
    assert owner.helper.on("cpu") is owner.helper.module
    assert owner.helper.on("meta").weight.is_meta
    owner.to_empty(device="cpu")
    assert owner.own.weight.device.type == "cpu" and owner.helper.module.weight.is_meta


def test_survives_pickling() -> None:
    owner = Owner()
    twin = pickle.loads(pickle.dumps(owner))
    x = torch.randn(3, 2)
    assert torch.equal(twin.helper(x), owner.helper(x))
