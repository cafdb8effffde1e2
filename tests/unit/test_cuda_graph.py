"""Which steps become graphs; what a captured one does is tested on a GPU."""

from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from flextok_pl.models.cuda_graph import can_capture, repeat


class OnCuda(nn.Module):
    """Says that its parameters are on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Linear(2, 2)

    def parameters(self, recurse: bool = True) -> Iterator[Any]:
        return iter([SimpleNamespace(is_cuda=True)])


def test_what_can_be_captured() -> None:
    assert not can_capture(nn.Linear(2, 2))
    for register in ("register_forward_hook", "register_forward_pre_hook"):
        module = OnCuda()
        assert can_capture(module)
        handle = getattr(module.part, register)(lambda *arguments: None)
        assert not can_capture(module), "a graph would not call the hook"
        handle.remove()
        assert can_capture(module)


def test_repeats_without_a_graph() -> None:
    for count, device in ((0, None), (40, None), (0, torch.device("cuda")), (3, torch.device("cuda"))):
        calls: list[int] = []
        repeat(lambda calls=calls: calls.append(1), count, device)
        assert len(calls) == count
