"""LPIPS (https://arxiv.org/abs/1801.03924) with AlexNet, as torchmetrics computes it."""

from pathlib import Path

from torch import Tensor

from flextok_pl.backbones.networks import lpips_network
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained


class LPIPS(MeasuringNetwork):
    """Perceptual distance of image pairs; `weights` is torchvision's AlexNet state dict."""

    def __init__(self, weights: Path | str | None = None) -> None:
        super().__init__("alex", lpips_network("alex", Pretrained("lpips_network", "alex", weights, "lpips")))

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair: (B, 3, H, W) uint8 twice -> (B,) float64 on the CPU."""
        with self.measuring():
            distance: Tensor = self.network(*(images.float() / 127.5 - 1 for images in (originals, reconstructions)))
        return distance.reshape(-1).cpu().double()
