"""LPIPS (https://arxiv.org/abs/1801.03924) with AlexNet, as torchmetrics computes it."""

from pathlib import Path

from torch import Tensor

from flextok_pl.backbones.networks import lpips_network
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.channels import as_rgb
from flextok_pl.parts import in_parts
from flextok_pl.precision import as_float64


class LPIPS(MeasuringNetwork):
    """Perceptual distance of image pairs; `weights` is torchvision's AlexNet state dict."""

    def __init__(self, weights: Path | str | None = None) -> None:
        super().__init__("alex", lpips_network("alex", Pretrained("lpips_network", "alex", weights, "lpips")))

    def __call__(self, originals: Tensor, reconstructions: Tensor) -> Tensor:
        """Distance of each pair: two (B, 3, H, W) uint8 -> (B,) float64 on their `summing_device`."""
        originals, reconstructions = (as_rgb(images, "lpips") for images in (originals, reconstructions))
        with self.measuring():
            return as_float64(in_parts(self._distances, originals, reconstructions))

    def _distances(self, *pair: Tensor) -> Tensor:
        distances: Tensor = self.network(*(images.float() / 127.5 - 1 for images in pair))
        return distances.reshape(-1)
