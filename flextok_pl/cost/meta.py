"""Steps that are counted as they run, on the meta device or any other: operations by torch, memory by the storages.

Shapes: B batch, S image side.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from flextok_pl.cost.flops import Flops
from flextok_pl.models.discriminator import PatchDiscriminator, hinge_loss
from flextok_pl.models.vae import VAE


class PeakMemory(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """The most bytes that tensors made under this mode hold at one time.

    Works on any device; memory that was there before, and what kernels use inside, is not seen.

    Attributes:
        peak: bytes.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.peak = self.alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation and take note of what it made."""
        given = {storage._cdata for storage in _storages((args, kwargs))}
        result = func(*args, **(kwargs or {}))
        for storage in _storages(result):
            if storage._cdata not in given | self._known:  # and else a view
                self._add(storage)
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.alive -= size


class SavedMemory(torch.autograd.graph.saved_tensors_hooks):
    """What autograd keeps of the forward passes under this context, each storage once, and parameters aside.

    Args:
        *modules: whose parameters.

    Attributes:
        total: bytes.
    """

    def __init__(self, *modules: nn.Module) -> None:
        known = {p.untyped_storage().data_ptr() for module in modules for p in module.parameters()}
        self.total = 0
        self._kept: list[Tensor] = []  # so that no address is given to another storage

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in known:
                known.add(storage.data_ptr())
                self.total += storage.nbytes()
                self._kept.append(tensor)
            return tensor

        super().__init__(pack, lambda tensor: tensor)


def _storages(values: Any) -> list[torch.UntypedStorage]:
    return [value.untyped_storage() for value in tree_leaves(values) if isinstance(value, Tensor)]


def image_work(call: Callable[[Tensor], object], image_size: int) -> tuple[float, float]:
    """(operations, bytes at the peak) of a network on the meta device over one image, without gradients."""
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    with torch.no_grad(), PeakMemory() as memory, FlopCounterMode(display=False) as counter:
        call(images)
    return float(counter.get_total_flops()), float(memory.peak)


def vae_step(vae: VAE, discriminator: PatchDiscriminator | None, image_size: int) -> tuple[Flops, float]:
    """(operations, bytes kept for the backward pass) of an autoencoder's training step, per image.

    The adaptive weight of the adversarial loss, two gradients of one layer, is left out.

    Args:
        vae: on the meta device.
        discriminator: likewise, or None for no adversarial loss.
        image_size: S.
    """
    images = torch.empty(1, 3, image_size, image_size, device="meta")
    with PeakMemory() as memory, FlopCounterMode(display=False) as counter:
        _, outputs = vae(images)
        loss = F.l1_loss(outputs, images)
        if discriminator is not None:
            discriminator.requires_grad_(False)
            loss = loss - discriminator(outputs).mean()
            discriminator.requires_grad_(True)
            real, fake = discriminator(torch.cat([images, outputs.detach()])).chunk(2)
            loss = loss + hinge_loss(real, fake)
        forward, peak = counter.get_total_flops(), memory.peak
        loss.backward()  # type: ignore[no-untyped-call]
        total = counter.get_total_flops()
    for module in (vae, discriminator):
        if module is not None:
            module.zero_grad()
    return Flops(float(forward), float(total - forward)), float(peak)
