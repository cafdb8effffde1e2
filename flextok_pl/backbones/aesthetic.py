"""The improved aesthetic predictor: rates the look of an image, whatever it shows, from about 1 to 10.

A multilayer perceptron on the normalised image embedding of CLIP ViT-L/14, after
https://github.com/christophschuhmann/improved-aesthetic-predictor (Schuhmann, 2022). B images, D features.
"""

from pathlib import Path

from torch import Tensor, nn

from flextok_pl.backbones.clip_score import CLIPNetwork
from flextok_pl.backbones.pretrained import MeasuringNetwork, Pretrained
from flextok_pl.precision import as_float64

AESTHETIC_CLIP = "openai/clip-vit-large-patch14"
AESTHETIC_URL = (
    "https://github.com/christophschuhmann/improved-aesthetic-predictor/raw/main/sac%2Blogos%2Bava1-l14-linearMSE.pth"
)
WIDTHS = (1024, 128, 64, 16, 1)
DROPOUTS = (0.2, 0.2, 0.1)


class AestheticScore(MeasuringNetwork):
    """Rates images, and moves to their device.

    `weights` is the published `sac+logos+ava1-l14-linearMSE.pth`; `clip` is a local folder with CLIP ViT-L/14, or its
    name on the Hugging Face Hub.
    """

    def __init__(self, weights: Path | str | None, clip: Path | str = AESTHETIC_CLIP) -> None:
        if weights is None:
            raise ValueError(f"aesthetic_weights=null: the aesthetic predictor needs its file; fetch {AESTHETIC_URL}")
        source = Pretrained("verifier", "aesthetic", weights, "aesthetic_weights")
        self._clip = CLIPNetwork("aesthetic_clip", clip)
        with source.loading(f"give the file from {AESTHETIC_URL}, and the CLIP model that it was fitted to"):
            head = aesthetic_head(self._clip.network.config.projection_dim)
            head.load_state_dict(source.state_dict(weights))
        super().__init__("aesthetic", nn.ModuleDict({"clip": self._clip.network, "head": head}))

    def __call__(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) uint8 -> (B,) float64, on the images' `summing_device`."""
        features = self._clip.embeddings(images)
        with self.to(images.device).measuring():
            ratings: Tensor = self.network["head"](features)
        return as_float64(ratings[:, 0])


class _Head(nn.Module):
    """Names its tensors as the published file does: `layers.0.weight`."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, features: Tensor) -> Tensor:
        """(B, D) -> (B, 1)."""
        return self.layers(features)  # type: ignore[no-any-return]


def aesthetic_head(width: int) -> nn.Module:
    """Five linear layers on (B, width) features, without activations; ImageReward ends in the same layers."""
    layers: list[nn.Module] = []
    for number, out in enumerate(WIDTHS):
        layers.append(nn.Linear(width, out))
        layers += [nn.Dropout(share) for share in DROPOUTS[number : number + 1]]
        width = out
    return _Head(*layers)
