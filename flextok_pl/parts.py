"""Batches in parts of a size that suits the device.

B images.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CPU_PART = 16
"""Images of 64 to 128 pixels whose feature maps stay in the caches of a CPU; in larger batches convolutions wait for
its memory, and take up to twice as long."""


def in_parts(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """What a function makes of (B, ...) batches, joined; it is given a few images at a time on a CPU, else all.

    The function treats images alike and apart. With more threads it is given more images, at least 8 for each.
    """
    size = max(CPU_PART, 8 * torch.get_num_threads())
    if batches[0].device.type != "cpu" or len(batches[0]) <= size:
        return function(*batches)
    parts = zip(*(torch.split(batch, size) for batch in batches), strict=True)
    return torch.cat([function(*part) for part in parts])
