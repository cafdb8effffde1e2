"""Hold a network that a module uses but does not train, average or store."""

from collections.abc import Callable
from typing import Any, Generic, Self, TypeVar

import torch
from torch import Tensor, nn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


class Frozen(nn.Module, Generic[ModuleT]):
    """Freezes a network in place and holds it outside the module tree.

    The network stays in evaluation mode and has no gradients. It is in neither `parameters()` nor `state_dict()`, and
    deep copies share it, so checkpoints do not store it and weight averaging does not double it. Attributes and calls
    pass through. It follows its owner's `.to()`; with `follows=False` it stays where `on` puts it.
    """

    module: ModuleT

    def __init__(self, module: ModuleT, follows: bool = True) -> None:
        super().__init__()
        self.follows = follows
        object.__setattr__(self, "module", module.requires_grad_(False).eval())  # bypasses nn.Module's registration

    def __getattr__(self, name: str) -> Any:
        if "module" not in self.__dict__:  # while unpickling
            raise AttributeError(name)
        return getattr(self.module, name)

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        if self.follows:
            self.module._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def on(self, device: torch.device | str) -> ModuleT:
        """Move the network to `device` and return it."""
        if next(self.module.parameters()).device != torch.device(device):
            self.module.to(device)
        return self.module

    def requires_grad_(self, requires_grad: bool = True) -> Self:
        """Does nothing: the network stays frozen."""
        return self

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the network."""
        return self.module(*args, **kwargs)


def is_frozen(network: nn.Module) -> bool:
    """Check that no parameter of a network is trained."""
    return not any(weight.requires_grad for weight in network.parameters())
