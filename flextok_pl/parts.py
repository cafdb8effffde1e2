"""Runs a function on a batch in parts that suit the device.

B images.
"""

from collections.abc import Callable

import torch
from torch import Tensor

CPU_PART = 16
"""Number of images of 64 to 128 px whose feature maps fit the caches of a CPU; on larger batches convolutions wait
for memory and take up to twice as long."""


def in_parts(function: Callable[..., Tensor], *batches: Tensor) -> Tensor:
    """Apply a function to (B, ...) batches and join the results: some images at a time on a CPU, else all at once.

    The function must treat images alike and separately. More threads take more images, at least 8 per thread.
    """
    size = max(CPU_PART, 8 * torch.get_num_threads())
    if batches[0].device.type != "cpu" or len(batches[0]) <= size:
        return function(*batches)
    parts = zip(*(torch.split(batch, size) for batch in batches), strict=True)
    return torch.cat([function(*part) for part in parts])
