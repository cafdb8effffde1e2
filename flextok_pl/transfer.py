"""Moves numbers between host and device without waiting on either side."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Copy host values to a device; other values stay where they are."""
    if device.type == "cuda" and values.is_cpu:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Arrival:
    """A scalar on a device that the host reads later."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._sent = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()

    def read(self) -> float:
        """The number; waits until the device has computed it."""
        if self._sent is not None:
            self._sent.synchronize()
        return float(self._value)
