"""Converts images of one or of many channels for networks and viewers that take RGB."""

import torch
from torch import Tensor


def as_rgb(images: Tensor, network: str) -> Tensor:
    """Turn (B, 1 or 3, H, W) images into the (B, 3, H, W) that an RGB network takes; a grey channel is repeated.

    Raises:
        ValueError: the images have another number of channels; the message names the network.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(
            f"{network} takes RGB or grey images, and these have {channels} channels: leave it out, or write a set "
            "with three of them"
        )
    return images.expand(-1, 3, -1, -1) if channels == 1 else images


def visible(images: Tensor) -> Tensor:
    """Turn (B, C, H, W) images into (B, 3, H, W) that a viewer shows: grey repeated, or the first three channels."""
    if images.shape[1] == 2:
        images = torch.cat([images, images[:, :1]], dim=1)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
