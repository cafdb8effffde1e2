"""LPIPS (https://arxiv.org/abs/1801.03924) with AlexNet, as torchmetrics computes it, from a file or a download."""

from __future__ import annotations

import pickle
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from torchmetrics.functional.image.lpips import _NoTrainLpips

from flextok_pl.contracts import weights_hash
from flextok_pl.precision import full_precision

ALEXNET_URL = "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"


class LPIPS:
    """Perceptual distance of image pairs.

    The calibrated linear layers come with torchmetrics; the AlexNet under them is torchvision's.

    Args:
        weights: torchvision's AlexNet state dict; None takes torch.hub's cache or downloads it.

    Raises:
        ValueError: the weights are missing or are another network's.
    """

    def __init__(self, weights: Path | str | None = None) -> None:
        remedy = f"fetch {ALEXNET_URL} and give it as lpips=PATH, or put it into {torch.hub.get_dir()}/checkpoints"
        try:
            if weights is None:
                state = torch.hub.load_state_dict_from_url(
                    ALEXNET_URL, map_location="cpu", progress=False, check_hash=True, weights_only=True
                )
            else:
                state = torch.load(weights, map_location="cpu", weights_only=True)
        except (URLError, OSError, RuntimeError, pickle.UnpicklingError) as error:
            raise ValueError(f"lpips: the AlexNet weights cannot be read ({str(error)[:200]}); {remedy}") from error
        self.network = _NoTrainLpips(net="alex", pnet_rand=True)
        backbone = self.network.net.state_dict()
        # slice1.0.weight -> features.0.weight
        renamed = {name: f"features.{name.split('.', 1)[1]}" for name in backbone}
        missing = sorted(theirs for theirs in renamed.values() if theirs not in state)
        if missing:
            raise ValueError(f"lpips={str(weights)!r} lacks {missing[0]}, so it is no torchvision AlexNet; {remedy}")
        self.network.net.load_state_dict({name: state[theirs] for name, theirs in renamed.items()})
        self.weights_hash = weights_hash(self.network)

    def to(self, device: torch.device) -> LPIPS:
        """Move the network."""
        self.network.to(device)
        return self

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair: (B, 3, H, W) uint8 twice -> (B,) float64 on the CPU."""
        pairs = [images.float() / 127.5 - 1 for images in (originals, reconstructions)]
        with torch.no_grad(), full_precision(originals.device):
            distance: Tensor = self.network(*pairs)
        return distance.reshape(-1).cpu().double()
