"""Pictures of one channel or of many, where a network or a viewer takes red, green and blue."""

import torch
from torch import Tensor


def as_rgb(images: Tensor, network: str) -> Tensor:
    """(B, 1 or 3, H, W) for a network of colour pictures: (B, 3, H, W), grey ones three times.

    Raises:
        ValueError: other channels have no colours; it names the network.
    """
    channels = images.shape[1]
    if channels not in (1, 3):
        raise ValueError(
            f"{network} looks at red, green and blue (or at grey), and these images have {channels} channels: leave it "
            "out, or choose three of them for a set of its own"
        )
    return images.expand(-1, 3, -1, -1) if channels == 1 else images


def visible(images: Tensor) -> Tensor:
    """(B, C, H, W) as a picture shows them, (B, 3, H, W): grey ones three times, of more channels the first three."""
    if images.shape[1] == 2:
        images = torch.cat([images, images[:, :1]], dim=1)
    return images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images[:, :3]
