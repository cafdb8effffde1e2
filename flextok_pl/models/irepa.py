"""iREPA: a REPA that keeps spatial structure (https://arxiv.org/abs/2512.10794).

It has two changes, each an option. The projection is a convolution, which sees a patch's neighbours. The teacher's
features are normalised over the patches of an image, which removes what all patches share.

Shapes: B batch, N = H x W decoder patches, D decoder width, F teacher width.
"""

from typing import Literal

from torch import Tensor, nn

from flextok_pl.models.teacher import ProjectionHead

Projection = Literal["mlp", "conv"]


class ConvProjection(nn.Conv2d):
    """A 3 x 3 convolution with zero padding from decoder width D to teacher width F; used in training only."""

    def __init__(self, width: int, teacher_dim: int) -> None:
        super().__init__(width, teacher_dim, kernel_size=3, padding=1)

    def forward(self, patches: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        """(B, N, D) patches that lie on H rows and W columns -> (B, N, F)."""
        maps = patches.transpose(1, 2).reshape(len(patches), -1, *grid)  # (B, D, H, W)
        return super().forward(maps).flatten(2).transpose(1, 2)


def build_projection(kind: Projection, width: int, teacher_dim: int) -> nn.Module:
    """REPA's MLP or iREPA's convolution; both map ((B, N, D) patches, their grid) to (B, N, F).

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in ("mlp", "conv"):
        raise ValueError(f"repa_projection={kind!r} is unknown; use 'mlp' or 'conv'")
    return ProjectionHead(width, teacher_dim) if kind == "mlp" else ConvProjection(width, teacher_dim)


def spatially_normalized(features: Tensor, mean_share: float) -> Tensor:
    """(x - `mean_share` mean(x)) / (std(x) + 1e-6), over the patches of an image, for each feature of (B, F, H, W).

    In float32. The published code divides by the standard deviation of a sample. That differs from this one by the same
    factor for all features, which a cosine ignores.
    """
    features = features.float()
    mean = features.mean(dim=(2, 3), keepdim=True)
    return (features - mean_share * mean) / (features.std(dim=(2, 3), keepdim=True, correction=0) + 1e-6)
