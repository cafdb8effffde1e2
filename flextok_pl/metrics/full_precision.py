"""The precision that measuring networks compute in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_backends: Any = torch.backends  # mypy knows but some of its attributes
# Not `allow_tf32`, torch's older interface: reading it is an error once somebody has set one of these.
_SETTINGS = (
    _backends.cuda.matmul,
    _backends.cudnn.conv,  # TF32 by default
    _backends.mkldnn.matmul,
    _backends.mkldnn.conv,
)


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """No gradients, and float32 throughout: neither autocast nor TF32 nor bfloat16, whatever the caller has set.

    The settings are those of the process, all threads included. Afterwards they have the values that they had, set
    explicitly: a later `torch.backends.fp32_precision`, which they may have followed before, no longer reaches them.

    Args:
        device_type: where the network is, such as `cuda`.
    """
    before = [setting.fp32_precision for setting in _SETTINGS]
    try:
        for setting in _SETTINGS:
            setting.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device_type, enabled=False):
            yield
    finally:
        for setting, precision in zip(_SETTINGS, before, strict=True):
            setting.fp32_precision = precision
