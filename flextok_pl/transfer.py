"""Numbers on their way between host and device, for which neither waits."""

from __future__ import annotations

import torch
from torch import Tensor


def send(values: Tensor, device: torch.device) -> Tensor:
    """Host values on a device; others stay where they are."""
    if device.type == "cuda" and values.is_cpu:
        return values.pin_memory().to(device, non_blocking=True)
    return values.to(device)


class Arrival:
    """A scalar of a device that the host will read later."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._sent = value, None
        if value.is_cuda:
            self._value = torch.empty((), dtype=value.dtype, pin_memory=True).copy_(value, non_blocking=True)
            self._sent = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._sent.record()

    def read(self) -> float:
        """The number, once the device has come to it."""
        if self._sent is not None:
            self._sent.synchronize()
        return float(self._value)
